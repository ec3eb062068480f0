"""Memory between calls: each buffer of the arena is given a place that nothing else has while it is in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from furiosa_build.backends.native.plan import ALIGNMENT
from furiosa_build.backends.native.values import Buffer, Value


def lay_out(calls: Sequence[tuple[str, Sequence[Value | None]]]) -> int:
    """Sets the place of every arena buffer that calls, of an operator each, use; returns how many bytes that takes.

    A buffer is in use from the first call that has it as an operand to the last. One that a pointwise call writes over
    its last input is that input's memory.
    """
    lives: dict[Buffer, tuple[int, int]] = {}
    for number, (_, operands) in enumerate(calls):
        for buffer in _arena_buffers(operands):
            begin, _ = lives.get(buffer, (number, number))
            lives[buffer] = begin, number
    same = _written_over(calls, lives)
    for buffer, first in same.items():
        lives[first] = lives[first][0], max(lives[first][1], lives.pop(buffer)[1])
    nbytes = place(lives)
    for buffer, first in same.items():
        buffer.place = first.place
    return nbytes


def place(lives: Mapping[Buffer, tuple[int, int]]) -> int:
    """Sets the place of buffers in use from one call to another; returns how many bytes that takes.

    The largest are placed first, each at the lowest place that is free all the time.
    """
    placed: list[Buffer] = []
    for buffer in sorted(lives, key=lambda buffer: (-buffer.nbytes, lives[buffer])):
        taken = sorted(
            (other.place, other.place + other.nbytes) for other in placed if _overlap(lives[buffer], lives[other])
        )
        buffer.place = _lowest_gap(taken, buffer.nbytes)
        placed.append(buffer)
    return max((_aligned(buffer.place + buffer.nbytes) for buffer in placed), default=0)


def _arena_buffers(operands: Sequence[Value | None]) -> list[Buffer]:
    return [value.buffer for value in operands if value is not None and value.buffer.kind == "arena"]


def _written_over(
    calls: Sequence[tuple[str, Sequence[Value | None]]], lives: Mapping[Buffer, tuple[int, int]]
) -> dict[Buffer, Buffer]:
    """Outputs of pointwise calls, and the buffers that they are written over: of inputs that nothing needs later."""
    same: dict[Buffer, Buffer] = {}
    ends = {buffer: last for buffer, (_, last) in lives.items()}
    for number, (op, operands) in enumerate(calls):
        out, *inputs = operands
        if op != "pointwise" or out is None or out.buffer not in lives or lives[out.buffer][0] != number:
            continue
        for value in inputs:
            if value is None or value.buffer.kind != "arena" or not _is_all_of(value, out):
                continue
            first = same.get(value.buffer, value.buffer)
            uses = [same.get(buffer, buffer) for buffer in _arena_buffers(inputs)]
            if ends[first] == number and uses.count(first) == 1:
                same[out.buffer] = first
                ends[first] = lives[out.buffer][1]
                break
    return same


def _is_all_of(value: Value, out: Value) -> bool:
    """Whether both are all of their buffers, element for element."""
    return (
        (value.dtype, value.shape, value.offset) == (out.dtype, out.shape, out.offset)
        and value.buffer.nbytes == out.buffer.nbytes
        and value.is_contiguous
        and out.is_contiguous
    )


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
