"""How many bytes a step has streamed, and of how many: told where the step works, read by whoever shows the build.

The two are different processes as a rule: between them is a file of 16 bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

_FORMAT = struct.Struct("<QQ")


class Meter:
    """Counts in the file `path`. A file that cannot be written is ignored, since it only informs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = self.total = 0

    def note(self, done: int, total: int) -> None:
        """Records that `done` of `total` bytes are done."""
        self.done, self.total = done, total
        with suppress(OSError):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, _FORMAT.pack(done, total), 0)
            finally:
                os.close(descriptor)


_current: ContextVar[Meter | None] = ContextVar("meter", default=None)


@contextmanager
def metered(path: Path | None) -> Iterator[None]:
    """Counts the bytes streamed in the block in the file `path`, which is removed afterwards. None: counts nothing."""
    token = _current.set(None if path is None else Meter(path))
    try:
        yield
    finally:
        _current.reset(token)
        if path is not None:
            with suppress(OSError):
                path.unlink()


def current() -> Meter | None:
    """The meter of the step that runs here, for work in other threads."""
    return _current.get()


def expect(count: int) -> None:
    """Announces that `count` more bytes will be streamed."""
    meter = _current.get()
    if meter is not None:
        meter.note(meter.done, meter.total + count)


def advance(count: int) -> None:
    """Records that `count` more bytes are done."""
    meter = _current.get()
    if meter is not None:
        meter.note(meter.done + count, meter.total)


def read(path: Path) -> tuple[int, int] | None:
    """Bytes done, and bytes in all; None when nothing is counted, or not how much there will be."""
    try:
        done, total = _FORMAT.unpack(path.read_bytes())
    except (OSError, struct.error):
        return None
    return (min(done, total), total) if total else None
