"""Named points at which a test may stop or fail a build: how the fault tests in tests/faults reach a certain moment.

The engine has one as well: `request:ID@step`, in every step that request ID is part of. The server's are those of its
engine, whose requests it calls `X-REQUEST-ID-0`, `-1` ..., and `serve@load`, before the model is loaded.

`FURIOSA_BUILD_FAULT=STEP@POINT=FIFO` makes the process that first reaches POINT while doing STEP write a line into the
named pipe and wait there for ever, to be killed; or, where a pipe FIFO.go is, until something is written to that.
`STEP@POINT=errno:ENOSPC` makes it fail with that error instead.
Without the variable a point does nothing.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

VARIABLE = "FURIOSA_BUILD_FAULT"

_step: ContextVar[str] = ContextVar("step", default="")


@contextmanager
def doing(step: str) -> Iterator[None]:
    """Names the step that the block works for."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def reach(point: str) -> None:
    """Marks that the current step has reached `point`. Raises OSError when such a fault is requested."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    place, _, fault = wanted.partition("=")
    if place != f"{_step.get()}@{point}":
        return
    if fault.startswith("errno:"):
        number = getattr(errno, fault.removeprefix("errno:"))
        raise OSError(number, os.strerror(number), f"fault point {point}")
    with Path(fault).open("w") as pipe:
        pipe.write(f"{os.getpid()}\n")
    go_on = Path(f"{fault}.go")
    if not go_on.exists():
        threading.Event().wait()
    go_on.read_text()
