"""Memory between calls: each buffer of the arena is given a place that nothing else has while it is in use."""

from __future__ import annotations

from collections.abc import Sequence

from furiosa_build.backends.native.plan import ALIGNMENT
from furiosa_build.backends.native.values import Buffer, Value


def lay_out(calls: Sequence[Sequence[Value | None]]) -> int:
    """Sets the place of every arena buffer that calls use; returns how many bytes that takes.

    A buffer is in use from the first call that has it as an operand to the last. The largest are placed first, each at
    the lowest place that is free all that time.
    """
    lives: dict[Buffer, tuple[int, int]] = {}
    for number, operands in enumerate(calls):
        for value in operands:
            if value is not None and value.buffer.kind == "arena":
                begin, _ = lives.get(value.buffer, (number, number))
                lives[value.buffer] = begin, number
    order = sorted(lives, key=lambda buffer: (-buffer.nbytes, lives[buffer]))
    placed: list[Buffer] = []
    for buffer in order:
        taken = sorted(
            (other.place, other.place + other.nbytes) for other in placed if _overlap(lives[buffer], lives[other])
        )
        buffer.place = _lowest_gap(taken, buffer.nbytes)
        placed.append(buffer)
    return max((_aligned(buffer.place + buffer.nbytes) for buffer in placed), default=0)


def _lowest_gap(taken: Sequence[tuple[int, int]], nbytes: int) -> int:
    place = 0
    for begin, end in taken:
        if place + nbytes <= begin:
            break
        place = max(place, _aligned(end))
    return place


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
