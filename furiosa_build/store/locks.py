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
    """While this is held, by as many as like, nothing is deleted."""
    with _guarded(root, fcntl.LOCK_SH):
        yield


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """While this is held nobody else looks up or commits."""
    with _guarded(root, fcntl.LOCK_EX):
        yield


def open_lock(path: Path) -> int:
    """A descriptor for `take_lock` and `try_lock`. Closing it gives the lock back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)


def take_lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> None:
    """Waits for the lock."""
    with suppress(OSError):  # no locks here
        fcntl.flock(descriptor, kind)


def try_lock(descriptor: int) -> bool:
    """Takes the lock unless another has it. Where locks do nothing, everyone takes it."""
    return _try(descriptor, fcntl.LOCK_EX)


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock of this file. Only where locks work."""
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
