"""The layout of matrices that the native kernels multiply by: blocks of 32 rows, in units of four bytes.

A row is cut into units of four bytes: one number of four bytes, two of two, or four of one; the last unit is filled up
with zeros. Of each unit, the 32 rows of a block lie side by side, so that one load brings what 8 or 16 outputs need of
one step: [blocks, units, 32, numbers of a unit]. Numbers of int8 are stored as value + 128, whichever form a checkpoint
has them in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from furiosa_build.backends.base import Packer
from furiosa_build.ir.dtypes import ITEMSIZE
from furiosa_build.ir.tensors import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROWS = 32
"""Rows of a block."""
UNIT = 4
"""Bytes of a unit."""
GROUP_SLOTS = 16
"""Slots of a KV cache that lie together: csrc/kv_cache.h has how."""
_FLOATS = ("float32", "bfloat16", "float16", "float8_e4m3fn")
_INTS = ("int8", "uint8", "int32")
"""Numbers of int8: as they are; with 128 added; and four of the latter in an int32."""
_UNITS_AT_A_TIME = 1 << 18


class NativePacker(Packer):
    """Matrices are packed; scales, biases and whatever has another number of dimensions stay as they are."""

    def layout(self, scheme: str, part: str, layout: Layout) -> Layout:
        del scheme, part
        return packed_layout(layout)

    def pack(self, scheme: str, part: str, tensor: Tensor) -> Tensor:
        del scheme, part
        return pack(tensor)


def is_packed(layout: Layout) -> bool:
    """Whether a parameter of this layout is packed. Floating-point numbers in one column are a scale for each row."""
    if len(layout.shape) != 2:
        return False
    return layout.dtype in _INTS or (layout.dtype in _FLOATS and layout.shape[1] > 1)


def packed_layout(layout: Layout) -> Layout:
    """The layout that a parameter has in memory: its own, if it is not packed."""
    if not is_packed(layout):
        return layout
    rows, columns = layout.shape
    size = ITEMSIZE[layout.dtype]
    dtype, numbers = ("uint8", UNIT) if layout.dtype in _INTS else (layout.dtype, UNIT // size)
    inner = () if numbers == 1 else (numbers,)
    return Layout(dtype, (-(-rows // ROWS), -(-columns * size // UNIT), ROWS, *inner))


def pack(tensor: Tensor) -> Tensor:
    """A parameter as it lies in memory. Needs little more memory than its result."""
    import torch

    own = Layout.of(tensor)
    if not is_packed(own):
        return tensor
    dtype, shape = packed_layout(own)
    result = torch.empty(shape[:3], dtype=torch.int32)
    for begin, end in _ranges(len(tensor), shape[1]):
        _rows(result, begin, end).copy_(_to_units(tensor[begin:end]))
    if used := len(tensor) % ROWS:
        result[-1, :, used:] = _zero(own)
    return result.view(getattr(torch, dtype)).reshape(shape)


def unpack(packed: Tensor, layout: Layout) -> Tensor:
    """The parameter of this layout that `pack` made `packed` of, bit for bit."""
    import torch

    if not is_packed(layout):
        return packed
    rows, columns = layout.shape
    units = packed.reshape(*packed.shape[:2], -1).view(torch.int32)
    result = torch.empty((rows, columns), dtype=getattr(torch, layout.dtype))
    for begin, end in _ranges(rows, units.shape[1]):
        result[begin:end] = _from_units(_rows(units, begin, end), result.dtype)[:, :columns]
    return result


def _ranges(rows: int, units: int) -> Iterator[tuple[int, int]]:
    """All rows, in small ranges of whole blocks; the rows of a last, partial block are a range of their own."""
    step = max(1, _UNITS_AT_A_TIME // (units * ROWS)) * ROWS
    whole = rows // ROWS * ROWS
    yield from ((begin, min(begin + step, whole)) for begin in range(0, whole, step))
    if whole < rows:
        yield whole, rows


def _rows(blocks: Tensor, begin: int, end: int) -> Tensor:
    """The units of one of the ranges, as a view: [blocks, rows of each, units]."""
    first, last = begin // ROWS, -(-end // ROWS)
    return blocks[first:last, :, : min(end - begin, ROWS)].transpose(1, 2)


def _to_units(rows: Tensor) -> Tensor:
    """Rows of one of the ranges as int32 [blocks, rows of each, units]."""
    import torch

    stored = rows.contiguous().view(torch.uint8)
    if missing := -stored.shape[1] % UNIT:
        stored = torch.nn.functional.pad(stored, (0, missing))
    if rows.dtype == torch.int8:
        stored = stored ^ 128
    return stored.view(torch.int32).reshape(-1, min(len(rows), ROWS), stored.shape[1] // UNIT)


def _from_units(units: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_to_units`; the last unit of a row may have padding."""
    import torch

    rows = units.clone(memory_format=torch.contiguous_format)
    stored = rows.reshape(-1, rows.shape[2]).view(torch.uint8)
    return (stored ^ 128 if dtype == torch.int8 else stored).view(dtype)


def _zero(layout: Layout) -> int:
    """A unit of zeros."""
    return -0x7F7F7F80 if layout.dtype in _INTS else 0  # 0x80808080: each byte is 0 + 128
