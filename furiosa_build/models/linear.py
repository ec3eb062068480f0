"""Linear layers with quantized weights, and how their product is formulated for a program.

One scale per output channel, weights only: `y = (x @ w.T) * scale`. Parameter names and stored bytes are those of a
compressed-tensors checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from furiosa_build.recipe.schema import Scheme

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
INT8_MAX = 127
INT8_ZERO = 128
"""compressed-tensors packs int8 as unsigned: value + 128."""

_MATRIX_VECTOR_ROWS = 2
"""Up to this many rows of activations a product is bound by reading the weight: convert it on the way."""


class QuantizedLinear(nn.Module):
    """A linear layer of `scheme`.

    Parameters: `weight` (float8_e4m3fn [out, in]) or `weight_packed` (uint8 = int8 + 128, [out, in rounded up to 4]),
    `weight_scale` [out, 1] of the model's dtype, and `bias` [out] if the original has one.
    """

    def __init__(self, original: nn.Linear, scheme: Scheme) -> None:
        super().__init__()
        rows, self.in_features = original.weight.shape
        stored = (
            torch.empty((rows, self.in_features), dtype=FP8, device="meta")
            if scheme == "fp8"
            else torch.empty((rows, packed_columns(self.in_features)), dtype=torch.uint8, device="meta")
        )
        self.weight_name = weight_name(scheme)
        self.register_parameter(self.weight_name, nn.Parameter(stored, requires_grad=False))
        scale = torch.empty((rows, 1), dtype=original.weight.dtype, device="meta")
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = original.bias
        self._to_float = fp8_to_float if scheme == "fp8" else int8_to_float

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out], in the dtype of x."""
        weight = getattr(self, self.weight_name)[:, : self.in_features]
        rows = x.numel() // x.shape[-1]
        product = _matrix_vector if rows <= _MATRIX_VECTOR_ROWS else _matrix_matrix
        y = product(x, weight, self.weight_scale, self._to_float)
        return y if self.bias is None else y + self.bias


def weight_name(scheme: Scheme) -> str:
    """The name a linear layer's weight has in a checkpoint of `scheme`."""
    return "weight_packed" if scheme == "int8" else "weight"


def packed_columns(columns: int) -> int:
    """compressed-tensors packs int8 by four into an int32: rows are padded to whole ones."""
    return -(-columns // 4) * 4


def int8_to_float(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 holding int8 + 128 -> the integers as floats (exact in bfloat16)."""
    return (packed.to(torch.int16) - INT8_ZERO).to(dtype)


def fp8_to_float(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """float8_e4m3fn -> `dtype`, by moving bits: the CPU has no vector instruction for it.

    A float8's seven low bits are the top of a bfloat16's exponent and mantissa, 2**120 too small; subnormals included.
    """
    bits = weight.view(torch.uint8).to(torch.int16)
    moved = ((bits & 0x80) << 8) | ((bits & 0x7F) << 4)
    return (moved.view(torch.bfloat16).float() * 2.0**120).to(dtype)


def _matrix_matrix(
    x: Tensor, weight: Tensor, scale: Tensor, to_float: Callable[[Tensor, torch.dtype], Tensor]
) -> Tensor:
    return F.linear(x, to_float(weight, x.dtype)) * scale.reshape(-1)


def _matrix_vector(
    x: Tensor, weight: Tensor, scale: Tensor, to_float: Callable[[Tensor, torch.dtype], Tensor]
) -> Tensor:
    product = (x.unsqueeze(-2).float() * to_float(weight, torch.float32)).sum(-1)
    return (product * scale.reshape(-1).float()).to(x.dtype)
