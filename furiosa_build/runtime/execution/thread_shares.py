"""How the cores are divided among the ranks, stages and replicas of an engine."""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from furiosa_build.backends.device import Device
from furiosa_build.core.errors import UserError


@dataclass(frozen=True)
class ThreadShare:
    """What one element computes with.

    Attributes:
        number: How many threads; None: as many as the thread has that computes.
        cores: The cores that they run on; None: any that the process may run on.
    """

    number: int | None = None
    cores: Set[int] | None = None

    def begin(self, device: Device[Any]) -> None:
        """The calling thread computes with this share from now on. Threads that it starts run on the same cores."""
        if self.cores is not None:
            os.sched_setaffinity(0, self.cores)
        if self.number is not None:
            device.limit_threads(self.number)


def divide(device: Device[Any], elements: int, num_threads: int | None, pinned: bool) -> list[ThreadShare]:
    """The shares of all elements, no two of which have a core in common where they are pinned.

    Args:
        device: Where programs run.
        elements: Ranks of all stages of all replicas.
        num_threads: All of them together; None: what the device gives this process.
        pinned: Whether each runs on cores of its own.

    Raises:
        UserError: There are fewer threads than elements, or fewer cores than pinned threads.
    """
    if num_threads is not None and num_threads < elements:
        what = f"num_threads={num_threads}: each of {elements} ranks, of all stages and replicas, needs one"
        raise UserError(what, where="num_threads", valid=f">= {elements}")
    number = max(1, (device.num_threads() if num_threads is None else num_threads) // elements)
    if not pinned:
        return [ThreadShare(number)] * elements
    cores = sorted(os.sched_getaffinity(0))
    if number * elements > len(cores):
        raise UserError(
            f"pin_threads: {number * elements} threads cannot each have one of {len(cores)} cores",
            where="num_threads",
            valid=f"{elements} to {len(cores)}",
        )
    return [ThreadShare(number, frozenset(cores[i * number : (i + 1) * number])) for i in range(elements)]
