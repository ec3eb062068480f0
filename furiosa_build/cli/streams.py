"""Standard streams that outlive their readers: a build is worth its artifact, and goes on when nobody reads its lines.

`| head` closes the pipe, the disk behind a file is full, a daemon has no streams at all. What cannot be written is
dropped, and in the end one line says so, unless the reader only had enough.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ERRORS = "furiosa_build.as_it_came"
"""How text is encoded that the stream's encoding does not have."""


class _Lasting(io.RawIOBase):
    """A descriptor that is written until that fails; from then on everything is dropped. `failure`: what failed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        while self.failure is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # another program that has the stream as well made it so
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.failure = error
        return len(data)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def fileno(self) -> int:
        return self._descriptor


def set_up() -> None:
    """Makes this process's stdout and stderr last. The descriptors 0 to 2 are open afterwards, and stay its streams."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass  # one that was closed: the next file to be opened would have taken its place
    os.close(descriptor)
    codecs.register_error(_ERRORS, _as_it_came)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # and no other that somebody has put in its place
            lasting, encoding = _Lasting(number), getattr(stream, "encoding", "utf-8")
            is_line_buffered = number == 2 or lasting.isatty()
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(lasting), encoding, _ERRORS, None, is_line_buffered))


def stdout_failure() -> OSError | None:
    """Why nothing more of what is printed arrives; None while all does."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, _Lasting) else None


def final_status(status: int) -> int:
    """The exit status of a command that would end with `status`; says on stderr if its output did not arrive."""
    failure = stdout_failure()
    if failure is None or failure.errno == errno.EPIPE:
        return status
    print(f"error: standard output cannot be written: {failure.strerror}", file=sys.stderr)
    return status or 1


@contextmanager
def lasting() -> Iterator[None]:
    """Runs a command, which ends by SystemExit, with streams that last."""
    set_up()
    try:
        yield
    except SystemExit as ended:
        status = ended.code
    else:
        status = 0
    sys.exit(final_status(status or 0) if status is None or isinstance(status, int) else status)


def _as_it_came(error: UnicodeError) -> tuple[bytes, int]:
    """Bytes of a file's name that were no text are written as they are; what the encoding lacks is escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    piece = error.object[error.start : error.end]
    return b"".join(map(_bytes_of, piece)), error.end


def _bytes_of(character: str) -> bytes:
    try:
        return character.encode("ascii", "surrogateescape")
    except UnicodeEncodeError:
        return character.encode("ascii", "backslashreplace")
