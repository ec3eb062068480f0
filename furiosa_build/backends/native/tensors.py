"""Tensors of the native backend: memory of this process, with a dtype and a shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from furiosa_build.backends.device import as_float32
from furiosa_build.backends.native.plan import ALIGNMENT
from furiosa_build.ir.tensors import Layout

_NUMPY = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
"""What numpy does not have is kept as its bits."""


class HostTensor:
    """A contiguous tensor.

    Attributes:
        layout: Its dtype and shape.
        array: Its memory, as numpy has it; bfloat16 and 8-bit floats are their bits.
        address: Where it begins.
        nbytes: Its size.
    """

    __slots__ = ("address", "array", "layout", "nbytes")

    def __init__(self, array: NDArray[Any], layout: Layout) -> None:
        self.array, self.layout = array, layout
        self.address, self.nbytes = int(array.ctypes.data), int(array.nbytes)

    def view(self, layout: Layout) -> HostTensor:
        """The same bytes with another layout. Raises ValueError when these are not as many."""
        if layout.nbytes != self.nbytes:
            raise ValueError(f"it is not a {layout.dtype} {list(layout.shape)}")
        return of_bytes(self.array.reshape(-1).view(np.uint8), layout)


def of_bytes(memory: NDArray[np.uint8], layout: Layout) -> HostTensor:
    """The tensor that lies in these bytes."""
    return HostTensor(memory.view(_dtype(layout)).reshape(layout.shape), layout)


def zeros(layout: Layout) -> HostTensor:
    """A tensor of zeros, whose pages are the system's until they are written. Raises MemoryError."""
    try:
        memory = np.zeros(layout.nbytes + ALIGNMENT, dtype=np.uint8)
    except ValueError as error:  # more than an address space holds
        raise MemoryError(str(error)) from error
    return of_bytes(_aligned(memory, layout.nbytes), layout)


def empty(layout: Layout) -> HostTensor:
    """A tensor to write to."""
    return of_bytes(_aligned(np.empty(layout.nbytes + ALIGNMENT, dtype=np.uint8), layout.nbytes), layout)


def sum_of(parts: Sequence[HostTensor]) -> HostTensor:
    """The sum, in order; of numbers of 16 bits in float32, rounded after each."""
    layout = parts[0].layout
    is_bfloat16 = layout.dtype == "bfloat16"
    total = parts[0].array
    with np.errstate(all="ignore"):  # infinities and NaN are what they are
        for part in parts[1:]:
            total = _add_bfloat16(total, part.array) if is_bfloat16 else total + part.array
    return HostTensor(total, layout)


def concatenate(parts: Sequence[HostTensor]) -> HostTensor:
    """Side by side along the last dimension."""
    array = np.concatenate([part.array for part in parts], axis=-1)
    return HostTensor(array, Layout(parts[0].layout.dtype, array.shape))


def _add_bfloat16(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.uint16]:
    total = as_float32(one) + as_float32(other)
    bits = total.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(total), np.uint16(0x7FC0), rounded.astype(np.uint16))  # rounding could carry a NaN away


def _aligned(memory: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    begin = -memory.ctypes.data % ALIGNMENT
    return memory[begin : begin + size]


def _dtype(layout: Layout) -> np.dtype[Any]:
    return np.dtype(_NUMPY.get(layout.dtype, layout.dtype))
