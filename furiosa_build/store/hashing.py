"""sha256 of files, remembered by (path, size, mtime_ns, inode): a checkpoint of 100 GB is read once."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

_CHUNK = 1 << 22


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 (hex) of a file's bytes; `progress` is told of every chunk read, in bytes."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return state.hexdigest()


class HashMemory:
    """Hashes seen before. A file that changes without changing its size, times and inode goes unnoticed."""

    def __init__(self, database: Path) -> None:
        self._database = database

    def recall(self, path: Path) -> str | None:
        """The file's sha256 if it is known and the file looks unchanged."""
        if not self._database.exists():
            return None
        with closing(self._connect()) as connection:
            row = connection.execute(
                "SELECT sha256 FROM hashes WHERE path=? AND size=? AND mtime_ns=? AND inode=?",
                _identity(path),
            ).fetchone()
        return None if row is None else str(row[0])

    def hash(self, path: Path, progress: Callable[[int], None] | None = None) -> str:
        """The file's sha256, read only if it is not known yet."""
        known = self.recall(path)
        if known is not None:
            if progress is not None:
                progress(path.stat().st_size)
            return known
        before = _identity(path)
        sha256 = hash_file(path, progress)
        if _identity(path) == before:
            with closing(self._connect()) as connection, connection:
                connection.execute("INSERT OR REPLACE INTO hashes VALUES (?, ?, ?, ?, ?)", (*before, sha256))
        return sha256

    def _connect(self) -> sqlite3.Connection:
        self._database.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self._database, timeout=60)
        connection.execute(
            "CREATE TABLE IF NOT EXISTS hashes "
            "(path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER, sha256 TEXT)"
        )
        return connection


def _identity(path: Path) -> tuple[str, int, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino
