"""Bytes, seconds, numbers and paths as text for people; and text from the command line."""

from __future__ import annotations

import os
from pathlib import Path

from furiosa_build.core.errors import UserError


def argument_text(argument: str) -> str:
    """An argument of the command line as the text that its bytes are in UTF-8, whatever the locale is.

    Raises UserError for other bytes.
    """
    if not any("\udc80" <= character <= "\udcff" for character in argument):
        return argument
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError as error:
        what = f"{argument!r} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise UserError(what, where="command line", valid="text in UTF-8") from None


def path_text(path: Path) -> str:
    """A path as the text that its bytes are in UTF-8, whatever the locale is, for libraries that take it as such.

    Raises UserError for other bytes: safetensors and torch open no file of such a name.
    """
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError as error:
        what = f"{str(path)!r} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        hint = "safetensors and torch open no such files: rename the directory, or move them"
        raise UserError(what, where=str(path), valid="a path in UTF-8", hint=hint) from None


def size_text(number: int) -> str:
    """A number of bytes as text, such as `334 MB`."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"


def duration_text(seconds: float) -> str:
    """A time as text, such as `8 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def memory_text(size: int | None) -> str:
    """A size as `size_text` gives it; None as `unknown`."""
    return "unknown" if size is None else size_text(size)


def count_text(number: int) -> str:
    """A count with a unit, such as `8.03 B` for 8.03 billion."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def steps_text(count: int) -> str:
    """A number of things, such as `1 step`."""
    return "1 step" if count == 1 else f"{count} steps"


def short_path(path: Path) -> str:
    """The path, relative to the current directory where it is below that."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
