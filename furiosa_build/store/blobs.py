"""Blobs: files by the sha256 of their content, read-only, never changed once visible."""

from __future__ import annotations

from pathlib import Path

from furiosa_build.core.failpoints import reach
from furiosa_build.core.file_digests import HashMemory, hash_file
from furiosa_build.core.files import sync


class Blobs:
    """A directory of files named by their sha256. `hashes` remembers which of them were read and found whole."""

    def __init__(self, root: Path, hashes: HashMemory) -> None:
        self.root = root
        self._hashes = hashes

    def path(self, sha256: str) -> Path:
        """Where the blob is, or would be."""
        return self.root / sha256[:2] / sha256

    def holds(self, sha256: str, size: int) -> bool:
        """Whether the blob exists undamaged. It is read only if it looks changed since it was last read."""
        path = self.path(sha256)
        try:
            return path.stat().st_size == size and self._hashes.hash(path) == sha256
        except OSError:
            return False

    def adopt(self, file: Path, sha256: str | None = None) -> tuple[str, int]:
        """Moves `file` in; returns its sha256 and size in bytes. Its content is on disk before it gets its name."""
        sha256 = sha256 or hash_file(file)
        size = file.stat().st_size
        target = self.path(sha256)
        if self.holds(sha256, size):
            file.unlink()
            return sha256, size
        file.chmod(0o444)
        sync(file)
        reach("after-fsync")
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
        self._hashes.remember(target, sha256)
        return sha256, size
