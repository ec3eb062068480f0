"""Cancelling work that a build does in its own process: hashing, copying, downloading.

Such work calls `check_cancelled` at least once a second; whoever runs it binds a token with `cancelled_by`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Cancelled(Exception):  # noqa: N818 (not an error of the program)
    """The work was cancelled."""


class CancellationToken:
    """Cancels the work that is bound to it. `cancel` may be called by signal handlers and from any thread."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        """Makes the work raise Cancelled at its next check."""
        self.is_cancelled = True


_token: ContextVar[CancellationToken | None] = ContextVar("cancellation token", default=None)


@contextmanager
def cancelled_by(token: CancellationToken) -> Iterator[None]:
    """Binds what is done within, in this thread, to a token."""
    previous = _token.set(token)
    try:
        yield
    finally:
        _token.reset(previous)


def check_cancelled() -> None:
    """Raises Cancelled if the work at hand has been cancelled."""
    token = _token.get()
    if token is not None and token.is_cancelled:
        raise Cancelled
