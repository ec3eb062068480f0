"""Locks between processes. They end with the process that holds them, however it ends.

Builds look up and commit actions under a shared guard, gc deletes under an exclusive one. On a file system without
locks they all do nothing: work may be done twice, and gc refuses to run.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NAME = "gc.lock"


@contextmanager
def shared(root: Path) -> Iterator[None]:
    """A guard for looking up and committing: nothing is deleted while anyone holds it."""
    with _guarded(root, fcntl.LOCK_SH):
        yield


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """A guard for deleting: nobody else looks up or commits while it is held."""
    with _guarded(root, fcntl.LOCK_EX):
        yield


def open_lock(path: Path) -> int:
    """A descriptor for `take_lock` and `try_lock`. Closing it releases the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def take_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> None:
    """Acquires the lock; waits while another process holds it."""
    with suppress(OSError):  # no locks here
        fcntl.flock(descriptor, kind)


def try_lock(descriptor: int) -> bool:
    """Acquires the lock unless another process holds it; returns whether it did. Always, where locks do nothing."""
    return _try(descriptor, fcntl.LOCK_EX)


def is_locked(path: Path) -> bool:
    """Whether any process holds the lock of this file. Meaningful only where locks work."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def locks_work(root: Path) -> bool:
    """Whether one lock excludes another on the store's file system."""
    path = root / "locks" / f"probe-{os.getpid()}"
    descriptor = open_lock(path)
    try:
        return try_lock(descriptor) and is_locked(path)
    finally:
        path.unlink()
        os.close(descriptor)


@contextmanager
def _guarded(root: Path, kind: int) -> Iterator[None]:
    try:
        descriptor = os.open(root / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # a store that cannot be written, or is not there: nobody deletes anything there
        yield
        return
    try:
        take_lock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # the second on some network file systems
        return False
    except OSError:  # no locks here
        return True
    return True
