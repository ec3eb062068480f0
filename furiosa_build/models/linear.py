"""Linear layers with quantized weights, and how their product is formulated for a program.

One scale per output channel, weights only: `y = (x @ w.T) * scale`. Parameter names and stored bytes are those of a
compressed-tensors checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from furiosa_build.recipe.schema import Scheme

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
INT8_MAX = 127
INT8_ZERO = 128
"""compressed-tensors packs int8 as unsigned: value + 128."""

_VECTOR_ROWS: dict[Scheme, int] = {"int8": 2, "fp8": 8}
"""Up to this many rows of activations, converting the weight inside the product is fastest."""
_INT8_KERNEL_ROWS = 32
"""Up to this many rows, torch's kernel for int8 weights beats a product with a converted copy of them.

Both bounds by measurement at 2048 x 8192 on one core with AVX-512; `benchmarks/block.py` shows the effect.
"""
_INT8_KERNEL_COLUMNS = 16
"""That kernel reads a row of bfloat16 in pieces of so many, beyond its end if it has no whole number of them."""


class QuantizedLinear(nn.Module):
    """A linear layer of `scheme`. `is_plain`: its product is formulated in operators of core ATen.

    Parameters: `weight` (float8_e4m3fn [out, in]) or `weight_packed` (uint8 = int8 + 128, [out, in rounded up to 4]),
    `weight_scale` [out, 1] of the model's dtype, and `bias` [out] if the original has one.
    """

    def __init__(self, original: nn.Linear, scheme: Scheme, is_plain: bool = False) -> None:
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
        self._scheme, self._is_plain = scheme, is_plain

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out], in the dtype of x."""
        weight = getattr(self, self.weight_name)[:, : self.in_features]
        rows = x.numel() // x.shape[-1]
        scale = self.weight_scale.reshape(-1)
        if self._is_plain:
            zero = INT8_ZERO if self._scheme == "int8" else 0
            y = F.linear(x, (weight.float() - zero).to(x.dtype)) * scale
        elif rows <= _VECTOR_ROWS[self._scheme]:
            y = _convert_inside(x, weight, scale, self._scheme)
        elif self._scheme == "int8" and rows <= _INT8_KERNEL_ROWS and self.in_features % _INT8_KERNEL_COLUMNS == 0:
            y = _int8_kernel(x, weight, scale)
        else:
            y = F.linear(x, to_float(weight, self._scheme).to(x.dtype)) * scale
        return y if self.bias is None else y + self.bias


def weight_name(scheme: Scheme) -> str:
    """The name a linear layer's weight has in a checkpoint of `scheme`."""
    return "weight_packed" if scheme == "int8" else "weight"


def packed_columns(columns: int) -> int:
    """compressed-tensors packs int8 by four into an int32: rows are padded to whole ones."""
    return -(-columns // 4) * 4


def to_float(weight: Tensor, scheme: Scheme) -> Tensor:
    """Stored weight -> float32, before scaling: exact for both schemes."""
    return fp8_to_float(weight) if scheme == "fp8" else weight.float() - INT8_ZERO


def fp8_to_float(weight: Tensor) -> Tensor:
    """float8_e4m3fn -> float32 (NaN excepted), by moving bits: the CPU has no vector instruction for it.

    A float8's seven low bits are the top of a float32's exponent and mantissa, 2**120 too small; subnormals included.
    """
    bits = weight.view(torch.uint8).to(torch.int32)
    moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return moved.view(torch.float32) * 2.0**120


def _convert_inside(x: Tensor, weight: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    product = (_materialize(x.float()).unsqueeze(-2) * to_float(weight, scheme)).sum(-1)
    return (product * scale.float()).to(x.dtype)


def _int8_kernel(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    signed = (weight ^ INT8_ZERO).view(torch.int8)
    y: Tensor = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), signed, scale)
    return y.reshape(*x.shape[:-1], -1)


def _materialize(x: Tensor) -> Tensor:
    """x, in memory of its own.

    Inductor would fold the conversion from bfloat16 into the product's loop and make that 32 lanes wide, where
    converting the weight has no vector form: 2 times (int8) to 10 times (fp8) slower. It does not fold a scatter.
    """
    return torch.zeros_like(x).index_copy(-1, torch.arange(x.shape[-1]), x)
