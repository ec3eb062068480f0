"""Work on a large matrix by slices of its rows: what is computed on stays in the processor's caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_ELEMENTS_AT_A_TIME = 1 << 18
"""Turned into float32 at a time: a large matrix needs little more memory than its result, and the processor's caches
hold what is computed on."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes in this thread alone: 2 GB/s, more than disks write.

    Threads would meet after every operation on a part: on idle cores twice as fast, on busy ones 20 times slower.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def row_slices(rows: int, columns: int) -> Iterator[slice]:
    """All rows, in slices that are small enough to be worked on."""
    step = max(1, _ELEMENTS_AT_A_TIME // columns)
    return (slice(begin, begin + step) for begin in range(0, rows, step))
