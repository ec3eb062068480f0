"""Blobs: files by the sha256 of their content, read-only, never changed once visible."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from furiosa_build.store.hashing import hash_file


class Blobs:
    """A directory of files named by their sha256."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, sha256: str) -> Path:
        """Where the blob is, or would be."""
        return self._root / sha256[:2] / sha256

    def holds(self, sha256: str, size: int) -> bool:
        """Whether the blob is there with its full size."""
        try:
            return self.path(sha256).stat().st_size == size
        except FileNotFoundError:
            return False

    def adopt(self, file: Path, sha256: str | None = None) -> tuple[str, int]:
        """Moves `file` in; returns its sha256 and size. It is on disk before it becomes visible under its name."""
        sha256 = sha256 or hash_file(file)
        size = file.stat().st_size
        target = self.path(sha256)
        if self.holds(sha256, size):
            file.unlink()
            return sha256, size
        file.chmod(0o444)
        _sync(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
        _sync(target.parent)
        return sha256, size


def place(source: Path, target: Path) -> None:
    """Makes `target` a hard link of `source`, or a copy where the file systems do not allow a link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        target.chmod(0o444)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
