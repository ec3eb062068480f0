"""Plans: programs as data. A plan lists views of buffers, and calls of operators of the library on them.

A run's buffers are the program's inputs in order, its outputs, the plan's constants, and the arena: memory for what
lies between the calls. Everything about a plan is checked before it runs (`check.py`), for the library trusts it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.ir.dtypes import ITEMSIZE

DType = Literal["float32", "bfloat16", "float16", "float64", "int64", "int32", "int8", "uint8", "bool"]
"""What a tensor of a plan may hold. The 8-bit floats of packed weights are `uint8`."""
MAX_RANK = 8
ALIGNMENT = 64
"""Bytes: where in the constants and the arena a tensor may begin."""

Number = float | Literal["inf", "-inf", "nan"]
"""A number, as JSON has it."""
_Size = Annotated[int, Field(ge=0, lt=1 << 48)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TensorType(_Data):
    """An input or output: contiguous. A first dimension of None is free: the slots of a KV cache."""

    dtype: DType
    shape: Annotated[list[_Size | None], Field(max_length=MAX_RANK)]

    @property
    def nbytes(self) -> int | None:
        """Bytes; None where a dimension is free."""
        sizes = [size for size in self.shape if size is not None]
        return None if len(sizes) < len(self.shape) else ITEMSIZE[self.dtype] * math.prod(sizes)


class View(_Data):
    """A tensor: a view of a buffer.

    Attributes:
        buffer: Its number.
        offset: Bytes from the buffer's beginning to the first element.
        shape: The sizes; 0 in the place of a free one.
        stride: Elements from one index to the next; 0 where a dimension repeats.
    """

    buffer: _Size
    offset: _Size
    dtype: DType
    shape: Annotated[list[_Size], Field(max_length=MAX_RANK)]
    stride: Annotated[list[_Size], Field(max_length=MAX_RANK)]

    @property
    def end(self) -> int:
        """The byte behind the last element that is reached."""
        if 0 in self.shape:
            return self.offset
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.offset + (last + 1) * ITEMSIZE[self.dtype]


class Call(_Data):
    """A call of an operator (`operators.py`). `tensors` are numbers of views; None: the operand is not given."""

    op: str
    tensors: list[_Size | None]
    ints: list[Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]] = []
    floats: list[Number] = []


class Plan(_Data):
    """A program.

    Attributes:
        inputs: In the order in which they are given.
        outputs: In the order in which they are returned.
        constants: One blob, as base64.
        arena: Bytes of memory between the calls.
        tensors: The views that calls use.
        calls: In order.
    """

    schema_version: Literal[1] = 1
    inputs: list[TensorType]
    outputs: list[TensorType]
    constants: str = ""
    arena: _Size = 0
    tensors: list[View]
    calls: list[Call]

    def to_json(self) -> bytes:
        """Canonical bytes: two equal plans give the same."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def num_buffers(self) -> int:
        """Buffers that a run is given: all but the arena, which is the next number."""
        return len(self.inputs) + len(self.outputs) + 1

    @property
    def constants_blob(self) -> bytes:
        """The constants. Raises ValueError when they are not base64."""
        return base64.b64decode(self.constants, validate=True)

    def operands(self, call: Call) -> Iterator[View | None]:
        """The tensors of a call, in order."""
        return (None if number is None else self.tensors[number] for number in call.tensors)
