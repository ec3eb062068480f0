"""A session is one process at work with a store: what it uses is pinned, its unfinished work lies in one directory.

sessions/ID/lock   held as long as the process lives, however it ends
            pins   keys of the actions that it uses, a line each
            ...    staging directories
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from furiosa_build.store.locks import is_locked, open_lock, shared, take_lock

_LOCK = "lock"
_PINS = "pins"


class Session:
    """The session of this process in the store at `root`; its directory is created when it is first needed."""

    def __init__(self, root: Path) -> None:
        self._store = root
        self._changing = threading.Lock()
        self._directory: Path | None = None
        self._lock = -1
        self._pinned: set[str] = set()

    def pin(self, key: str) -> None:
        """Keeps gc from removing an action while the session lasts."""
        directory = self._started()
        with self._changing:
            if key not in self._pinned:
                with (directory / _PINS).open("a") as file:
                    file.write(f"\n{key}\n")  # on a line of its own, even if a full disk cut the last one short
                self._pinned.add(key)

    def path(self, name: str) -> Path:
        """A path for a file that is removed with the session."""
        return self._started() / name

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty directory on the store's file system; removed afterwards."""
        directory = Path(tempfile.mkdtemp(dir=self._started()))
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def close(self) -> None:
        """Ends the session."""
        with self._changing:
            if self._directory is not None:
                with shared(self._store):  # gc would come across a directory that is half gone
                    shutil.rmtree(self._directory, ignore_errors=True)
                os.close(self._lock)
            self._directory = None
            self._pinned.clear()

    def _started(self) -> Path:
        with self._changing:
            if self._directory is None:
                parent = self._store / "sessions"
                parent.mkdir(parents=True, exist_ok=True)
                with shared(self._store):  # gc would take a directory whose lock is not held for one that was left
                    directory = Path(tempfile.mkdtemp(dir=parent, prefix=f"{os.getpid()}-"))
                    directory.chmod(0o755)  # others may see what is pinned
                    self._lock = open_lock(directory / _LOCK)
                    take_lock(self._lock)
                self._directory = directory
            return self._directory


def all_sessions(root: Path) -> list[Path]:
    """The directories of all sessions of the store at `root`."""
    parent = root / "sessions"
    return sorted(parent.iterdir()) if parent.is_dir() else []


def is_alive(directory: Path) -> bool:
    """Whether the session's process still holds its lock. Meaningful only where locks work."""
    return is_locked(directory / _LOCK)


def pins(directory: Path) -> set[str]:
    """Keys of the actions that a session uses."""
    file = directory / _PINS
    return set(file.read_text(errors="replace").split()) if file.is_file() else set()
