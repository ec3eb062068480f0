"""Models on the Hugging Face hub, and its cache on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from furiosa_build.core.cancellation import check_cancelled
from furiosa_build.core.errors import UserError
from furiosa_build.core.progress import current
from furiosa_build.recipe.schema import ModelSpec
from furiosa_build.weights.hf_layout import INDEX_FILE, MODEL_FILES, WEIGHT_PATTERNS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


_COMMIT = re.compile(r"[0-9a-f]{40}")

_MODULE = "furiosa_build.weights.download"
_POLL = 0.1
"""Seconds between two looks at whether a download has been cancelled."""


def hub_cache() -> Path:
    """The directory of the hub's cache on this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def resolve_commit(model: ModelSpec) -> str | None:
    """The commit that a hub model's revision stands for, if that is known without asking the hub."""
    revision = model.revision or "main"
    if _COMMIT.fullmatch(revision):
        return revision
    snapshot = cached_snapshot(model)
    return None if snapshot is None else snapshot.name


def cached_snapshot(model: ModelSpec) -> Path | None:
    """The directory in the hub's cache that has files of the model's revision, if there is one."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("config.json", INDEX_FILE, "model.safetensors"):
        file = try_to_load_from_cache(model.model_id_or_path, name, revision=model.revision, cache_dir=hub_cache())
        if isinstance(file, str):
            return Path(file).parent
    return None


def cached_bytes(model: ModelSpec) -> int:
    """Bytes of the model's files that need no download any more: of its revision, and of those that are wanted."""
    snapshot = cached_snapshot(model)
    if snapshot is None:
        return 0
    found = {path for pattern in (*WEIGHT_PATTERNS, *MODEL_FILES) for path in snapshot.glob(pattern)}
    return sum(path.stat().st_size for path in found if path.is_file())


def download(model: ModelSpec, revision: str | None, patterns: Sequence[str]) -> Path:
    """Takes what is in the hub's cache, and fetches what is not. The result's name is the commit.

    Raises UserError where the files cannot be fetched, Cancelled within a second after the work is cancelled: whatever
    the network does, for another process waits for it.
    """
    wanted, meter = revision or model.revision or "main", current()
    found = _in_process(
        {
            "repository": model.model_id_or_path,
            "revision": wanted,
            "patterns": list(patterns),
            "meter": None if meter is None else str(meter.path),
        }
    )
    if "error" in found:
        token = "set" if os.environ.get("HF_TOKEN") else "not set"
        raise UserError(
            f"model {model.model_id_or_path!r} (revision {wanted}) could not be fetched: {found['error']}",
            where="model.model_id_or_path",
            hint=f"is the network there, and does HF_TOKEN ({token}) give access? A local copy works as well: "
            "model.model_id_or_path=DIRECTORY. For random weights: model.seed_for_random_weight=0",
        )
    return Path(found["directory"])


def _in_process(request: dict[str, Any]) -> dict[str, str]:
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
