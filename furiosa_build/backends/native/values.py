"""Values: the tensors of a plan in the making. Views of a value cost nothing; memory is given out when all is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from furiosa_build.backends.native.plan import DType
from furiosa_build.ir.dtypes import ITEMSIZE


@dataclass(eq=False)
class Buffer:
    """Memory that values are views of.

    Attributes:
        kind: What it is: `arena` lies where memory planning puts it.
        place: The number of an input or output; of constants and the arena the byte, once it is known.
        nbytes: Its size; 0 for inputs and outputs.
    """

    kind: Literal["input", "output", "constant", "arena"]
    place: int
    nbytes: int = 0


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor: a view of a buffer, as `plan.View`."""

    buffer: Buffer
    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0

    @staticmethod
    def whole(buffer: Buffer, dtype: DType, shape: Sequence[int]) -> Value:
        """All of a buffer, in row-major order."""
        return Value(buffer, dtype, tuple(shape), contiguous_stride(shape))

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie one behind the other, in row-major order."""
        expected = contiguous_stride(self.shape)
        pairs = zip(self.shape, self.stride, expected, strict=True)
        return all(size == 1 or own == dense for size, own, dense in pairs)

    def permute(self, dims: Sequence[int]) -> Value:
        """Dimensions in another order."""
        dims = [dim % len(self.shape) for dim in dims]
        shape, stride = tuple(self.shape[d] for d in dims), tuple(self.stride[d] for d in dims)
        return replace(self, shape=shape, stride=stride)

    def expand(self, shape: Sequence[int]) -> Value:
        """Broadcast to a shape; -1 is the size that the dimension has."""
        missing = len(shape) - len(self.shape)
        own, stride = (1,) * missing + self.shape, (0,) * missing + self.stride
        sizes = tuple(size if wanted == -1 else wanted for size, wanted in zip(own, shape, strict=True))
        steps = tuple(0 if size == 1 else step for size, step in zip(own, stride, strict=True))
        return replace(self, shape=sizes, stride=steps)

    def slice(self, dim: int, begin: int | None = None, end: int | None = None, step: int = 1) -> Value:
        """A range of a dimension, as Python slices."""
        dim %= len(self.shape)
        indices = range(self.shape[dim])[slice(begin, end, step)]
        shape = (*self.shape[:dim], len(indices), *self.shape[dim + 1 :])
        stride = (*self.stride[:dim], self.stride[dim] * step, *self.stride[dim + 1 :])
        return self._moved(indices.start * self.stride[dim] if indices else 0, shape, stride)

    def select(self, dim: int, index: int) -> Value:
        """One index of a dimension, which goes away."""
        dim %= len(self.shape)
        moved = range(self.shape[dim])[index] * self.stride[dim]
        return self._moved(moved, self.shape[:dim] + self.shape[dim + 1 :], self.stride[:dim] + self.stride[dim + 1 :])

    def unsqueeze(self, dim: int) -> Value:
        """With a dimension of one before `dim`."""
        dim %= len(self.shape) + 1
        shape = (*self.shape[:dim], 1, *self.shape[dim:])
        return replace(self, shape=shape, stride=(*self.stride[:dim], 0, *self.stride[dim:]))

    def squeeze(self, dims: Sequence[int]) -> Value:
        """Without those of these dimensions that are of size one."""
        gone = {dim % len(self.shape) for dim in dims if self.shape[dim] == 1}
        kept = [d for d in range(len(self.shape)) if d not in gone]
        return self.permute(kept)

    def reshape(self, shape: Sequence[int]) -> Value | None:
        """The same elements in another shape, which may have one -1; None where that needs a copy."""
        sizes = list(shape)
        if -1 in sizes:
            known = math.prod(size for size in sizes if size != -1)
            sizes[sizes.index(-1)] = self.numel // known if known else 0
        if self.numel == 0:
            return replace(self, shape=tuple(sizes), stride=contiguous_stride(sizes))
        stride = _reshaped(self.shape, self.stride, sizes)
        return None if stride is None else replace(self, shape=tuple(sizes), stride=stride)

    def bitcast(self, dtype: DType) -> Value:
        """The same bytes as elements of another dtype, of the same size."""
        if ITEMSIZE[dtype] != ITEMSIZE[self.dtype]:
            raise ValueError(f"a {self.dtype} is not as large as a {dtype}")
        return replace(self, dtype=dtype)

    def _moved(self, elements: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Value:
        return replace(self, offset=self.offset + elements * ITEMSIZE[self.dtype], shape=shape, stride=stride)


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of row-major order."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def _reshaped(shape: Sequence[int], stride: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...] | None:
    """The strides of the new shape: runs of dimensions that lie as one are divided anew."""
    runs: list[list[int]] = []  # [elements, innermost stride], outermost first
    for size, step in zip(shape, stride, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * step:
            runs[-1] = [runs[-1][0] * size, step]
        else:
            runs.append([size, step])
    result: list[int] = []
    left, step = 1, 1
    for size in reversed(wanted):
        if size == 1:
            result.append(0)
            continue
        if left == 1 and runs:
            left, step = runs.pop()
        if left % size:
            return None
        result.append(step)
        left, step = left // size, step * size
    return tuple(reversed(result)) if left == 1 and not runs else None
