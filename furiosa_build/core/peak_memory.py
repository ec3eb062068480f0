"""How much memory work takes at its peak, by sampling: private memory, and the pages of files that are mapped.

Private memory is what nobody else can use meanwhile. Mapped pages the system takes back when it needs them, so a model
larger than the memory can be mapped. Linux tells the two apart; elsewhere the peak is unknown.
"""

from __future__ import annotations

import ctypes
import os
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

_INTERVAL = 0.005
"""Seconds between samples. Each costs some 50 microseconds; what comes and goes between two of them is missed."""

_PROC = Path("/proc")


class Usage(NamedTuple):
    """Bytes of memory: private (anonymous), and mapped from files or shared with other processes."""

    private: int
    mapped: int


class Watch:
    """A context manager that watches this process, and with `children` all that it has started, while it is open.

    Attributes:
        peak: The highest private memory and, apart from it, the most mapped pages: sums over the processes. None where
            nothing can be known.
    """

    def __init__(self, children: bool = False) -> None:
        self.peak = usage(os.getpid())
        self._children = children
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_on, name="memory watch", daemon=True)

    def __enter__(self) -> Watch:
        if self.peak is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.peak is not None:
            self._stop.set()
            self._thread.join()

    def _sample_on(self) -> None:
        while True:
            self._sample()
            if self._stop.wait(_INTERVAL):
                return self._sample()

    def _sample(self) -> None:
        pids = [os.getpid(), *(_descendants(os.getpid()) if self._children else ())]
        found = [now for pid in pids if (now := usage(pid)) is not None]
        assert self.peak is not None
        private, mapped = self.peak
        self.peak = Usage(
            max(private, sum(now.private for now in found)),
            max(mapped, sum(now.mapped for now in found)),
        )


def give_back() -> None:
    """Returns freed memory to the system, which glibc otherwise keeps for later: some 100 MB after a step."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def usage(pid: int) -> Usage | None:
    """What a process uses now. None where the system does not say, and of a process that has ended."""
    try:
        lines = (_PROC / str(pid) / "status").read_text(errors="replace").splitlines()
    except OSError:
        return None
    fields = {name: value for name, _, value in (line.partition(":") for line in lines) if name.startswith("Rss")}
    if "RssAnon" not in fields:
        return None
    anonymous, file, shared = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile", "RssShmem"))
    return Usage(anonymous, file + shared)


def _descendants(pid: int) -> list[int]:
    threads: list[Path] = []
    with suppress(OSError):  # it has ended
        threads += (_PROC / str(pid) / "task").iterdir()
    found: list[int] = []
    for thread in threads:
        with suppress(OSError):
            found += map(int, (thread / "children").read_text().split())
    return found + [grandchild for child in found for grandchild in _descendants(child)]
