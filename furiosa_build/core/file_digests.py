"""sha256 of files and parts of them, remembered by path, size, times and inode: a checkpoint of 100 GB is read once."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from furiosa_build.core.cancellation import check_cancelled
from furiosa_build.core.progress import advance

_CHUNK = 1 << 22


Extent = tuple[int, int]
"""Where a part of a file begins and ends, in bytes."""


def hash_file(path: Path, extent: Extent | None = None) -> str:
    """sha256 (hex) of a file's bytes; with `extent` of that part only. Can be cancelled."""
    state = hashlib.sha256()
    begin, end = extent or (0, sys.maxsize)
    with path.open("rb") as file:
        file.seek(begin)
        while chunk := file.read(min(_CHUNK, end - file.tell())):
            check_cancelled()
            state.update(chunk)
            advance(len(chunk))
    return state.hexdigest()


class HashMemory:
    """Hashes seen before. A file that changes without changing its size, times and inode goes unnoticed.

    The time of its last change (ctime) tells of content whose time of modification was restored.

    A memory that cannot be read or written is ignored: everything is hashed again.

    Args:
        database: Where hashes are remembered between processes.
        trust: False: what other processes have hashed is read again.
        linked: The files are read-only, and shared by hard links that come and go. Each of these counts as a change,
            so ctime does not.
    """

    def __init__(self, database: Path, trust: bool = True, linked: bool = False) -> None:
        self._database = database
        self._trust = trust
        self._linked = linked
        self._known_here: dict[_Identity, str] = {}

    def recall(self, path: Path, extent: Extent | None = None) -> str | None:
        """The sha256 of the file, or of a part, if it is known and the file looks unchanged."""
        identity = self._identity(path, extent)
        if identity in self._known_here or not self._trust:
            return self._known_here.get(identity)
        with suppress(sqlite3.Error), self._connected("ro") as connection:
            query = f"SELECT sha256, seal FROM {_TABLE} WHERE {' AND '.join(f'{name}=?' for name in _COLUMNS)}"
            for sha256, seal in connection.execute(query, identity):
                return str(sha256) if seal == _seal(identity, str(sha256)) else None
        return None

    def hash(self, path: Path, anew: bool = False, extent: Extent | None = None) -> str:
        """The sha256 of the file, or of a part, read only if it is not known yet, or is wanted `anew`."""
        known = None if anew else self.recall(path, extent)
        if known is not None:
            return known
        before = self._identity(path, extent)
        sha256 = hash_file(path, extent)
        if self._identity(path, extent) == before:
            self._remember(before, sha256)
        return sha256

    def remember(self, path: Path, sha256: str) -> None:
        """Notes what the caller knows: that `path`, as it is now, has this sha256."""
        self._remember(self._identity(path), sha256)

    def forget_missing(self) -> None:
        """Forgets files that are gone."""
        with suppress(sqlite3.Error), self._connected("rw") as connection:
            paths = [path for (path,) in connection.execute(f"SELECT DISTINCT path FROM {_TABLE}")]
            gone = [(path,) for path in paths if not Path(os.fsdecode(path)).exists()]
            connection.executemany(f"DELETE FROM {_TABLE} WHERE path=?", gone)

    def _remember(self, identity: _Identity, sha256: str) -> None:
        self._known_here[identity] = sha256
        with suppress(OSError):
            try:
                self._write(identity, sha256)
            except sqlite3.Error as error:  # else it is read-only, full, or locked for a minute
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
                    self._database.unlink(missing_ok=True)

    def _write(self, identity: _Identity, sha256: str) -> None:
        self._database.parent.mkdir(parents=True, exist_ok=True)
        with self._connected("rwc") as connection:
            connection.execute(
                f"CREATE TABLE IF NOT EXISTS {_TABLE} (path BLOB, size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, "
                "inode INTEGER, first INTEGER, last INTEGER, sha256 TEXT, seal TEXT, PRIMARY KEY (path, first, last))"
            )
            connection.execute(
                f"INSERT OR REPLACE INTO {_TABLE} ({', '.join(_COLUMNS)}, sha256, seal) "
                f"VALUES ({'?, ' * len(_COLUMNS)}?, ?)",
                (*identity, sha256, _seal(identity, sha256)),
            )

    @contextmanager
    def _connected(self, mode: Literal["ro", "rw", "rwc"]) -> Iterator[sqlite3.Connection]:
        uri = f"file:{quote(os.fsencode(self._database))}?mode={mode}"
        with closing(sqlite3.connect(uri, uri=True, timeout=60)) as connection, connection:
            connection.execute("PRAGMA synchronous=OFF")  # what a power cut spoils is read again
            yield connection

    def _identity(self, path: Path, extent: Extent | None = None) -> _Identity:
        stat = path.stat()
        ctime = 0 if self._linked else stat.st_ctime_ns
        # Of the whole, no size: there is one row for it, whatever the file becomes.
        return os.fsencode(path.resolve()), stat.st_size, stat.st_mtime_ns, ctime, stat.st_ino, *(extent or (0, -1))


_TABLE = "digests_of_parts"
_COLUMNS = ("path", "size", "mtime_ns", "ctime_ns", "inode", "first", "last")
_DAMAGED = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_MISMATCH)

_Identity = tuple[bytes, int, int, int, int, int, int]


def _seal(identity: _Identity, sha256: str) -> str:
    """A row whose seal is another has been damaged."""
    return hashlib.sha256(repr((identity, sha256)).encode()).hexdigest()
