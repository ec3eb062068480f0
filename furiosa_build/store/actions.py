"""Actions: what a step made, under the key of all that determined it.

blobs/ab/abcd...              content by sha256
actions/ab/KEY/manifest.json  the outputs of one action; its presence is what makes the action done
               key_factors.json   what the key was made of
staging/  locks/  logs/  scratch/  hashes.sqlite
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from pydantic import BaseModel, ConfigDict

from furiosa_build.canonical import canonical_json, digest
from furiosa_build.store.blobs import Blobs
from furiosa_build.store.hashing import HashMemory


def default_store_root() -> Path:
    """`$FURIOSA_BUILD_CACHE`, or `~/.cache/furiosa/llm`."""
    return Path(os.environ.get("FURIOSA_BUILD_CACHE") or "~/.cache/furiosa/llm").expanduser()


class Output(BaseModel):
    """One file that an action made."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int
    sha256: str


class ActionRecord(BaseModel):
    """A finished action: its outputs by relative path, and how long it took (seconds; not part of any digest)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    key: str
    step: str
    seconds: float
    outputs: dict[str, Output]

    @property
    def digest(self) -> str:
        """Of the outputs' names and contents: what the steps that follow depend on."""
        return digest({path: output.sha256 for path, output in self.outputs.items()})


class Made(NamedTuple):
    """What the work of an action says of itself.

    Attributes:
        digests: sha256 of output files (relative paths) that the work already knows.
        seconds: How long it worked, without waiting for its turn; None: all the time counts.
    """

    digests: Mapping[str, str] = {}
    seconds: float | None = None


class Store:
    """A store in `root`. Every method may be called by several processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs = Blobs(root / "blobs")
        self.hashes = HashMemory(root / "hashes.sqlite")

    def find(self, key: str) -> ActionRecord | None:
        """The action of this key, if it is done and all its blobs are there."""
        try:
            record = ActionRecord.model_validate_json(self._manifest(key).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        complete = all(self._blobs.holds(output.sha256, output.size) for output in record.outputs.values())
        return record if complete else None

    def path(self, output: Output) -> Path:
        """The read-only file that holds an output."""
        return self._blobs.path(output.sha256)

    def read_json(self, record: ActionRecord, path: str) -> Any:
        """An output as JSON."""
        return json.loads(self.path(record.outputs[path]).read_bytes())

    def scratch(self, name: str) -> Path:
        """A directory that survives, for a tool's own caches; nothing may depend on what is in it."""
        return self.root / "scratch" / name

    def log_path(self, step: str) -> Path:
        """Where a step's log goes."""
        path = self.root / "logs" / f"{step.replace(':', '-')}-{os.getpid()}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Saves two processes from doing the same work. Nothing is wrong without it."""
        path = self.root / "locks" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty directory on the store's file system; gone afterwards."""
        parent = self.root / "staging"
        parent.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(dir=parent))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def obtain(
        self,
        key: str,
        step: str,
        factors: Mapping[str, Any],
        work: Callable[[Path], Made],
    ) -> tuple[ActionRecord, bool]:
        """The action of this key; `work` makes its outputs in a directory if it is not done yet.

        Returns the action and whether `work` ran. When `work` raises, nothing is recorded.
        """
        with self.lock(key):
            found = self.find(key)
            if found is not None:
                return found, False
            with self.staging() as staged:
                begin = time.monotonic()
                made = work(staged)
                return self._commit(key, step, staged, factors, made, time.monotonic() - begin), True

    def _commit(
        self, key: str, step: str, staged: Path, factors: Mapping[str, Any], made: Made, elapsed: float
    ) -> ActionRecord:
        """Takes all files of `staged` in and publishes the action by one rename."""
        outputs = {}
        for file in sorted(path for path in staged.rglob("*") if path.is_file()):
            relative = file.relative_to(staged).as_posix()
            sha256, size = self._blobs.adopt(file, made.digests.get(relative))
            outputs[relative] = Output(size=size, sha256=sha256)
        seconds = round(elapsed if made.seconds is None else made.seconds, 3)
        record = ActionRecord(key=key, step=step, seconds=seconds, outputs=outputs)
        directory = self._manifest(key).parent
        directory.mkdir(parents=True, exist_ok=True)
        self._write(directory / "key_factors.json", canonical_json(factors))
        self._write(self._manifest(key), canonical_json(record.model_dump(mode="json")))
        return record

    def _manifest(self, key: str) -> Path:
        return self.root / "actions" / key[:2] / key / "manifest.json"

    def _write(self, path: Path, data: bytes) -> None:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
