"""Finding files, putting them in place, and onto the disk."""

from __future__ import annotations

import os
from pathlib import Path

from furiosa_build.core.cancellation import check_cancelled
from furiosa_build.core.errors import UserError

_CHUNK = 1 << 24
"""Bytes that are copied at a time."""


def expand_user(path: str | Path, where: str, hint: str = "") -> Path:
    """The path with a home directory in place of a leading `~`. Raises UserError (`where`, `hint`) without one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        whose = "this user has" if Path(path).parts[0] == "~" else "there is"
        raise UserError(f"{path}: {whose} no such home directory", where=where, hint=hint) from None


def link_or_copy(source: Path, target: Path) -> None:
    """Makes `target` a hard link of `source`, or a read-only copy where the file systems do not allow a link."""
    check_cancelled()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # of a link the content is meant
    except OSError:
        copy(source, target)
        target.chmod(0o444)


def copy(source: Path, target: Path) -> None:
    """Copies a file's content. Can be cancelled; what has been written then stays."""
    with source.open("rb") as read, target.open("wb") as written:
        while chunk := read.read(_CHUNK):
            check_cancelled()
            written.write(chunk)


def sync(path: Path) -> None:
    """Returns when a file, or the entries of a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Writes a text file at once: whoever reads it meanwhile has the earlier one."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8", errors="backslashreplace")  # the name of a directory may be any bytes
    new.replace(path)
