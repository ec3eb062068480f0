"""Bytes and seconds as text for people."""

from __future__ import annotations


def size_text(number: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"


def duration_text(seconds: float) -> str:
    """Such as `8 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def memory_text(size: int | None) -> str:
    """Such as `334 MB`."""
    return "unknown" if size is None else size_text(size)
