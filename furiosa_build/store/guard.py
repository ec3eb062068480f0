"""Keeps gc and builds apart: builds look up and commit actions under a shared guard, gc deletes under an exclusive one.

On a file system without locks the guards do nothing, and gc refuses to run.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_NAME = "gc.lock"


@contextmanager
def shared(root: Path) -> Iterator[None]:
    """While this is held, by as many as like, nothing is deleted."""
    with _locked(root, fcntl.LOCK_SH):
        yield


@contextmanager
def exclusive(root: Path) -> Iterator[None]:
    """While this is held nobody else looks up or commits."""
    with _locked(root, fcntl.LOCK_EX):
        yield


def locks_work(root: Path) -> bool:
    """Whether one lock excludes another on the store's file system."""
    path = root / "locks" / "probe"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, is_singleton=False), FileLock(path, timeout=0, is_singleton=False):
            return False
    except Timeout:
        return True


@contextmanager
def _locked(root: Path, kind: int) -> Iterator[None]:
    try:
        descriptor = os.open(root / _NAME, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # a store that cannot be written: nobody deletes anything there
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)
