"""How many threads a program may keep busy, and the pool of each thread that runs programs."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from furiosa_build.backends.native.library import Library, Pool


class _Limit(threading.local):
    """Of the calling thread. None: it has none."""

    threads: int | None = None


_limit = _Limit()


def limit_threads(number: int) -> None:
    """Programs that the calling thread runs from now on use so many threads, that one among them."""
    _limit.threads = number


class ThreadPools:
    """A pool for every thread that asks, with its share of the cores. A pool ends with its thread."""

    def __init__(self, library: Library, concurrency: int, cores: int | None = None) -> None:
        """`concurrency` threads run programs at the same time, on `cores`: by default those of `usable_cores`."""
        self._library = library
        self._threads = max(1, (usable_cores() if cores is None else cores) // concurrency)
        self._own = threading.local()

    def get(self) -> Pool:
        """The pool of the calling thread: of as many threads as `limit_threads` says, or its share of the cores."""
        wanted = self._threads if _limit.threads is None else _limit.threads
        pool: Pool | None = getattr(self._own, "pool", None)
        if pool is None or self._own.threads != wanted:
            pool = self._own.pool = self._library.pool(wanted)
            self._own.threads = wanted
        return pool


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores that this process may run on, or as many as its quota of processor time is worth if that is less."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):  # another kind of cgroup, or none
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
