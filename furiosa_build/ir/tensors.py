"""Tensors as data: inputs and outputs of programs, and what is stored in a file."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import BaseModel

from furiosa_build.ir.dtypes import ITEMSIZE

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["activation", "parameter", "kv_cache"]


class TensorSpec(BaseModel):
    """One input or output of a program. A dimension of None is free: the number of slots of a KV cache.

    `block` counts the supertask's layers: the one that a parameter or a KV cache belongs to. A parameter without one is
    called as in the model; one of a layer by its name in the layer.

    All are contiguous, in row-major order. A parameter whose stored dtype differs is reinterpreted bytewise
    (little-endian): the number of bytes agrees.
    """

    name: str
    role: Role
    dtype: str
    shape: list[int | None]
    block: int | None = None


class Layout(NamedTuple):
    """dtype, as torch calls it without its prefix (`bfloat16`), and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout that a tensor has."""
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return ITEMSIZE[self.dtype] * math.prod(self.shape)
