"""Plans as the numbers that the library takes (csrc/program.h)."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from furiosa_build.backends.native.operators import OPERATORS
from furiosa_build.backends.native.plan import MAX_RANK, Call, DType, Plan, View

DTYPES: Mapping[DType, int] = {
    "float32": 0,
    "bfloat16": 1,
    "float16": 2,
    "float64": 3,
    "int64": 4,
    "int32": 5,
    "int8": 6,
    "uint8": 7,
    "bool": 8,
}
"""Numbers of dtypes; csrc/kernels.h has the same."""

Place = tuple[int, int]
"""A buffer, and bytes from its beginning."""


def encode(plan: Plan, places: Sequence[Place] | None = None, first: int = 0) -> tuple[list[int], list[int]]:
    """The tensors and the calls of a plan that has been checked.

    In a larger program the plan's buffers, the arena last, lie at `places`, and its tensors are numbered from `first`.
    """
    if places is None:
        places = [(buffer, 0) for buffer in range(plan.num_buffers + 1)]
    tensors = [number for view in plan.tensors for number in _tensor(view, places[view.buffer])]
    return tensors, [number for call in plan.calls for number in _call(call, first)]


def _tensor(view: View, place: Place) -> list[int]:
    buffer, offset = place
    unused = [0] * (MAX_RANK - len(view.shape))
    sizes = [*view.shape, *unused, *view.stride, *unused]
    return [buffer, offset + view.offset, DTYPES[view.dtype], len(view.shape), *sizes]


def _call(call: Call, first: int) -> list[int]:
    tensors = [-1 if number is None else first + number for number in call.tensors]
    floats = [_bits(float(number)) for number in call.floats]
    head = [OPERATORS[call.op].number, len(tensors), *tensors]
    return [*head, len(call.ints), *call.ints, len(floats), *floats]


def _bits(number: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", number))[0])
