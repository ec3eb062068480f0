"""Models on the Hugging Face hub, and its cache on this machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from furiosa_build.core.cancellation import check_cancelled
from furiosa_build.core.errors import UserError
from furiosa_build.core.progress import current
from furiosa_build.core.safetensors_header import DTYPES
from furiosa_build.ir.tensors import Layout
from furiosa_build.weights.adapters import ADAPTER_CONFIG, check_no_adapter
from furiosa_build.weights.directory import ModelDirectory
from furiosa_build.weights.header import Header
from furiosa_build.weights.hf_layout import INDEX_FILE, MODEL_FILES, WEIGHT_PATTERNS, WHOLE_FILE, no_weights
from furiosa_build.weights.model_source import ModelSource, Reference

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_WHOLE = (*MODEL_FILES, *WEIGHT_PATTERNS, ADAPTER_CONFIG)

_MODULE = "furiosa_build.weights.download"
_POLL = 0.1
"""Seconds between two looks at whether a download has been cancelled."""


class HubModel(ModelSource):
    """A model on the hub, of a revision: a branch, a tag or a commit."""

    is_remote = True

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name, self.revision = name, revision or "main"
        self._fetched: dict[tuple[str, ...], ModelDirectory] = {}

    @classmethod
    def sniff(cls, reference: Reference) -> HubModel | None:
        return cls(reference.name, reference.revision) if _HUB_ID.fullmatch(reference.name) else None

    def config(self) -> dict[str, Any]:
        return self._fetch(("config.json", ADAPTER_CONFIG)).config()

    def commit(self) -> str | None:
        """Known without asking the hub for a commit, and for a revision of which the hub's cache has files."""
        if _COMMIT.fullmatch(self.revision):
            return self.revision
        snapshot = self._snapshot()
        return None if snapshot is None else snapshot.name

    def at(self, commit: str | None) -> HubModel:
        return self if commit in (None, self.revision, self.commit()) else HubModel(self.name, commit)

    def model_files(self) -> dict[str, Path]:
        return (self._fetched.get(_WHOLE) or self._fetch(MODEL_FILES)).model_files()

    def original_files(self) -> dict[str, Path]:
        """Those that a build fetches: what else the hub's cache has of the model depends on the machine."""
        found = (self._fetched.get(_WHOLE) or self._fetch(MODEL_FILES)).original_files()
        return {name: path for name, path in found.items() if any(fnmatchcase(name, pattern) for pattern in _WHOLE)}

    def weight_files(self) -> dict[str, Path]:
        return self._fetch(_WHOLE).weight_files()

    def header(self) -> Header | None:
        """Of what is in the hub's cache; else the hub is asked, if it has been asked for the config."""
        snapshot = self._snapshot()
        if snapshot is not None and any((snapshot / name).exists() for name in (WHOLE_FILE, INDEX_FILE)):
            with suppress(UserError):  # some of the files are not here yet
                return ModelDirectory(snapshot).header()
        if not self._fetched:
            return None
        found = _in_process({"repository": self.name, "revision": self._commit(), "patterns": [], "meter": None})
        if "others" in found and "transformers_weights" not in self.config():
            raise no_weights(self.name, found["others"])
        if "files" not in found:  # the download will say why
            return None
        layouts = {
            file: {name: Layout(DTYPES.get(dtype, dtype), tuple(shape)) for name, (dtype, shape) in tensors.items()}
            for file, tensors in sorted(found["files"].items())
        }
        return Header.of(layouts, (found["metadata"] or {}).get("dtype"))

    def cached_bytes(self) -> int:
        """Bytes that need no download any more: of the wanted files of this revision."""
        snapshot = self._snapshot()
        if snapshot is None:
            return 0
        found = {path for pattern in _WHOLE for path in snapshot.glob(pattern)}
        return sum(path.stat().st_size for path in found if path.is_file())

    def _snapshot(self) -> Path | None:
        """The directory in the hub's cache that has files of this revision, if there is one."""
        from huggingface_hub import try_to_load_from_cache

        for directory in self._fetched.values():
            return directory.path
        for name in ("config.json", INDEX_FILE, WHOLE_FILE):
            file = try_to_load_from_cache(self.name, name, revision=self.revision, cache_dir=hub_cache())
            if isinstance(file, str):
                return Path(file).parent
        return None

    def _commit(self) -> str:
        """The commit of what has been fetched, since a branch may move meanwhile; before that the revision."""
        return next((directory.path.name for directory in self._fetched.values()), self.revision)

    def _fetch(self, patterns: tuple[str, ...]) -> ModelDirectory:
        """The files of these names; asks the hub once."""
        if patterns not in self._fetched:
            directory = download(self.name, self._commit(), patterns)
            check_no_adapter(directory, self.name)
            self._fetched[patterns] = ModelDirectory(directory)
        return self._fetched[patterns]


def hub_cache() -> Path:
    """The directory of the hub's cache on this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def download(name: str, revision: str, patterns: Sequence[str]) -> Path:
    """Takes what is in the hub's cache, and fetches what is not. The result's name is the commit.

    Raises UserError where the files cannot be fetched, Cancelled within a second after the work is cancelled: whatever
    the network does, for another process waits for it.
    """
    meter = current()
    found = _in_process(
        {
            "repository": name,
            "revision": revision,
            "patterns": list(patterns),
            "meter": None if meter is None else str(meter.path),
        }
    )
    if "error" in found:
        raise UserError(
            f"model {name!r} (revision {revision}) could not be fetched: {found['error']}",
            where="model.model_id_or_path",
            hint=f"{found['hint']}. A local copy works as well: model.model_id_or_path=DIRECTORY. For random weights: "
            "model.seed_for_random_weight=0",
        )
    return Path(found["directory"])


def _in_process(request: dict[str, Any]) -> dict[str, Any]:
    """What `weights.download` answers. Its process ends with this one."""
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            [sys.executable, "-m", _MODULE, json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=told,
            stderr=complaints,
            start_new_session=True,  # an interruption reaches this process, which then ends that one
        )
        with process:
            try:
                while process.poll() is None:
                    check_cancelled()
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(_POLL)
            finally:
                process.kill()
        told.seek(0)
        complaints.seek(0)
        if process.returncode:
            raise RuntimeError(f"the download ended with status {process.returncode}: {complaints.read()}")
        return json.loads(told.read())  # type: ignore[no-any-return]
