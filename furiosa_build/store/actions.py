"""Actions: the outputs of a step, under the key of all that determined them.

blobs/ab/abcd...                  content by sha256
actions/ab/KEY/manifest.json      the outputs of one action; its presence is what makes the action done, its time of
                                  modification is when the action was last used
               key_factors.json   what the key was made of
sessions/  locks/  logs/  scratch/  hashes.sqlite  code.json  gc.lock
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from furiosa_build.core.errors import StepError
from furiosa_build.core.failpoints import doing, reach
from furiosa_build.core.file_digests import HashMemory
from furiosa_build.core.files import expand_user
from furiosa_build.core.peak_memory import Usage
from furiosa_build.store.blobs import Blobs
from furiosa_build.store.locks import open_lock, shared, try_lock
from furiosa_build.store.records import MANIFEST, ActionRecord, Outcome, Output, read_action, write_action
from furiosa_build.store.sessions import Session


def default_store_root() -> Path:
    """`$FURIOSA_BUILD_CACHE`, or `~/.cache/furiosa/llm`. Raises UserError where there is no such home directory."""
    hint = "set FURIOSA_BUILD_CACHE to a directory for the store"
    return expand_user(os.environ.get("FURIOSA_BUILD_CACHE") or "~/.cache/furiosa/llm", "FURIOSA_BUILD_CACHE", hint)


_LOGS = "logs"
_POLL = 0.05
"""Seconds between two looks at a lock that another process holds."""


class ActionResult(NamedTuple):
    """What the work of an action reports about itself.

    Attributes:
        digests: sha256 (hex) of output files, by relative path, where the work knows them already.
        seconds: How long it worked, without waiting for its turn; None: all of the elapsed time.
        peak: The memory it used at its peak; None: unknown.
    """

    digests: Mapping[str, str] = {}
    seconds: float | None = None
    peak: Usage | None = None


class Store:
    """A store in `root`. Every method may be called by several processes at once.

    A store that cannot be written is used as it is; what it lacks is built in a directory that `close` removes.

    Args:
        root: The store's directory; need not exist.
        verify: Read every file again, also those that look unchanged.
        fallback: Where to build, in a directory of its own, what a store that cannot be written lacks; None: in TMPDIR.

    Attributes:
        hashes: Digests of files that are the user's.
        link_hashes: Digests of blobs, and of the files of artifacts, which are links of them.
        notify: Called with messages for people: which process a step waits for, or that nothing can be kept.
    """

    def __init__(self, root: Path, verify: bool = False, fallback: Path | None = None) -> None:
        self.root = root
        self.notify: Callable[[str], None] = lambda _: None
        self.hashes = HashMemory(root / "hashes.sqlite", trust=not verify)
        self.link_hashes = HashMemory(root / "hashes.sqlite", trust=not verify, linked=True)
        self._fallback = fallback
        self._blobs = Blobs(root / "blobs", self.link_hashes)
        self._session = Session(root)
        self._interrupted = False
        self._making_substitute = threading.Lock()
        self._substitute: Store | None = None

    @cached_property
    def is_writable(self) -> bool:
        """Whether finished steps can be kept."""
        nearest = next(place for place in (self.root, *self.root.parents) if os.path.lexists(place))
        return os.access(nearest, os.W_OK | os.X_OK)

    def find(self, key: str) -> ActionRecord | None:
        """The action of this key, if it is done and all its blobs are whole."""
        with shared(self.root):
            found = self._find(key)
        if found is None and self._substitute is not None:
            return self._substitute.find(key)
        return found

    def path(self, output: Output) -> Path:
        """The read-only file that holds an output."""
        return self.blob(output.sha256)

    def blob(self, sha256: str) -> Path:
        """The read-only file that has this digest."""
        if self._substitute is not None:
            made = self._substitute.blob(sha256)
            if made.exists():  # what has the same name in this store may be damaged
                return made
        return self._blobs.path(sha256)

    def read_json(self, record: ActionRecord, path: str) -> Any:
        """An output as JSON."""
        return json.loads(self.path(record.outputs[path]).read_bytes())

    def records(self) -> Iterator[tuple[ActionRecord, dict[str, Any], float]]:
        """All finished actions with the factors of their keys and the time they were last used (Unix seconds)."""
        for manifest in sorted(self.root.glob(f"actions/*/*/{MANIFEST}")):
            try:
                record, factors = read_action(manifest.parent)
                last_used = manifest.stat().st_mtime
            except (OSError, ValueError):  # removed or damaged: the same as missing
                continue
            yield record, factors, last_used

    def scratch(self, name: str) -> Path:
        """A directory that survives, for a tool's own caches; nothing may depend on what is in it."""
        return self._writable().root / "scratch" / name

    def log_path(self, step: str) -> Path:
        """The path of a step's log."""
        path = self._writable().root / _LOGS / f"{step.replace(':', '-')}-{os.getpid()}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def meter_path(self, step: str) -> Path | None:
        """The file in which a running step counts its bytes; None: the store cannot be written."""
        try:
            return self._session.path(f"{step.replace(':', '-')}.bytes") if self.is_writable else None
        except OSError:  # it only informs; the step will say what is wrong
            return None

    @contextmanager
    def lock(self, key: str, step: str) -> Iterator[None]:
        """Keeps two processes from doing the same work. Correctness does not depend on it."""
        path = self.root / "locks" / key
        descriptor = open_lock(path)
        try:
            if not try_lock(descriptor):
                self.notify(f"{step}: waiting for {_read(path) or 'another process'}, which is doing it")
            while not try_lock(descriptor):
                if self._interrupted:
                    raise StepError(step, "the build was interrupted")
                time.sleep(_POLL)
            with suppress(OSError):  # it only informs
                path.write_text(f"process {os.getpid()} on {platform.node()}")
            yield
        finally:
            os.close(descriptor)

    def get_or_run(
        self,
        key: str,
        step: str,
        factors: Mapping[str, Any],
        work: Callable[[Path], ActionResult],
    ) -> Outcome:
        """The action of this key. If it is not done yet, `work` writes its outputs into a directory.

        When `work` raises, nothing is recorded.
        """
        if not self.is_writable:
            found = self.find(key)
            return (
                Outcome(found, ran=False)
                if found is not None
                else self._writable().get_or_run(key, step, factors, work)
            )
        with doing(step), self.lock(key, step):
            found = self.find(key)
            if found is not None:
                return Outcome(found, ran=False)
            reach("before-staging")
            with self._session.staging() as staged:
                begin = time.monotonic()
                result = work(staged)
                return Outcome(self._commit(key, step, staged, factors, result, time.monotonic() - begin), ran=True)

    def interrupt(self) -> None:
        """Makes steps that wait for another process fail at once. May be called by signal handlers."""
        self._interrupted = True

    def close(self) -> None:
        """Ends this process's work with the store."""
        self._session.close()
        if self._substitute is not None:
            self._substitute.close()
            _remove_but_logs(self._substitute.root)
            self._substitute = None

    def _find(self, key: str) -> ActionRecord | None:
        directory = self._directory(key)
        try:
            record, _ = read_action(directory)
        except (OSError, ValueError):
            return None
        if not all(self._blobs.holds(output.sha256, output.size) for output in record.outputs.values()):
            return None
        if self.is_writable:
            with suppress(OSError):  # a full disk, or another user's file
                self._session.pin(key)
                os.utime(directory / MANIFEST)
        return record

    def _writable(self) -> Store:
        """The store that new actions are written to: this one, or its substitute."""
        if self.is_writable:
            return self
        with self._making_substitute:
            if self._substitute is None:
                if self._fallback is not None:
                    self._fallback.mkdir(parents=True, exist_ok=True)
                self._substitute = Store(Path(tempfile.mkdtemp(dir=self._fallback, prefix=".store-")))
                told = f"the store {self.root} cannot be written: what is built is not kept there"
                self.notify(f"{told}; cache_dir or FURIOSA_BUILD_CACHE names another")
            return self._substitute

    def _commit(
        self, key: str, step: str, staged: Path, factors: Mapping[str, Any], result: ActionResult, elapsed: float
    ) -> ActionRecord:
        """Adopts all files of `staged` and publishes the action by one rename."""
        with shared(self.root):
            outputs = {}
            for file in sorted(path for path in staged.rglob("*") if path.is_file()):
                relative = file.relative_to(staged).as_posix()
                sha256, size = self._blobs.adopt(file, result.digests.get(relative))
                outputs[relative] = Output(size=size, sha256=sha256)
            seconds = round(elapsed if result.seconds is None else result.seconds, 3)
            private, mapped = result.peak or (None, None)
            record = ActionRecord(
                key=key, step=step, seconds=seconds, peak_memory=private, peak_mapped=mapped, outputs=outputs
            )
            self._session.pin(key)
            write_action(self._directory(key), record, factors)
            return record

    def _directory(self, key: str) -> Path:
        return self.root / "actions" / key[:2] / key


def _remove_but_logs(root: Path) -> None:
    """Removes a substitute but for the logs of failed steps, which messages have named."""
    for path in root.iterdir():
        if path.name != _LOGS:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    for path in (root / _LOGS, root):
        with suppress(OSError):
            path.rmdir()


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
