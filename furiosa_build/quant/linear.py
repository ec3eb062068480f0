"""Linear layers with quantized weights, and how their product is formulated for a program.

`y = (x @ w.T) * scale`, with x rounded first where the form says so. Parameter names and stored bytes are those of a
compressed-tensors checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.eight_bit import EightBit
from furiosa_build.quant.int8 import Int8
from furiosa_build.quant.scheme import QuantScheme

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
INT8_MAX = 127
INT8_ZERO = 128
"""compressed-tensors packs int8 as unsigned: value + 128."""

_VECTOR_ROWS = {"int8": 2, "fp8": 8}
"""Up to this many rows of activations, converting the weight inside the product is fastest."""
_INT8_KERNEL_ROWS = 32
"""Up to this many rows, torch's kernel for int8 weights beats a product with a converted copy of them.

Both bounds by measurement at 2048 x 8192 on one core with AVX-512; `benchmarks/block.py` shows the effect.
"""
_INT8_KERNEL_COLUMNS = 16
"""That kernel reads a row of bfloat16 in pieces of so many, beyond its end if it has no whole number of them."""


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored by a scheme. `decomposes`: its product is one of operators of core ATen.

    Its parameters are the scheme's operands, and `bias` [out] if the original has one. They have no memory.
    """

    def __init__(self, original: nn.Linear, scheme: QuantScheme, decomposes: bool = False) -> None:
        super().__init__()
        assert isinstance(scheme, EightBit)
        self._form, self.in_features = scheme, original.in_features
        operands = scheme.operands(Layout.of(original.weight))
        for name, layout in operands.items():
            empty = torch.empty(layout.shape, dtype=getattr(torch, layout.dtype), device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self._operands = tuple(operands)
        self.bias = original.bias
        self._decomposes = decomposes
        self.largest_of_all: Callable[[Tensor], Tensor] | None = None
        """Where the input is a rank's share: from the largest numbers of its tokens [..., 1] to those of all shares."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out], in the dtype of x."""
        form = self._form
        x = self._rounded(x) if form.rounds_activations else x
        weight, scale = (getattr(self, name) for name in self._operands)
        weight = weight[:, : self.in_features]
        rows = x.numel() // x.shape[-1]
        scale = scale.reshape(-1)
        if rows <= _VECTOR_ROWS[form.family] and not self._decomposes:
            y = _convert_inside(x, weight, scale, form)
        elif rows <= _INT8_KERNEL_ROWS and self._has_kernel and not self._decomposes:
            y = _int8_kernel(x, weight, scale, form)
        else:
            y = F.linear(x, to_float(weight, form, self._decomposes).to(x.dtype)) * scale
        return y if self.bias is None else y + self.bias

    def _rounded(self, x: Tensor) -> Tensor:
        """x, each token of it rounded to the numbers of the form's kind, in the dtype of x: as compressed-tensors does.

        Its int8 steps are 255 / 2 to the largest number, not 127: that one is clamped.
        """
        is_int8 = self._form.family == "int8"
        largest = x.abs().amax(-1, keepdim=True)
        if self.largest_of_all is not None:
            largest = self.largest_of_all(largest)
        scale = largest / (INT8_MAX + 0.5 if is_int8 else FP8_MAX)
        scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        if is_int8:
            return (x / scale).clamp(-INT8_MAX - 1, INT8_MAX).round() * scale
        rounded = (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8)
        return to_float(rounded, self._form, self._decomposes).to(x.dtype) * scale

    @property
    def _has_kernel(self) -> bool:
        """Whether torch's kernel for int8 weights takes this one: it wants a scale for each row."""
        form = self._form
        return form.family == "int8" and not form.tensor and self.in_features % _INT8_KERNEL_COLUMNS == 0


def to_float(weight: Tensor, form: EightBit, decomposes: bool = False) -> Tensor:
    """Stored weight -> float32, before scaling: exact for every form. `decomposes`: in operators of core ATen."""
    if form.family == "fp8" and not decomposes:
        return fp8_to_float(weight)
    return form.to_float(weight)


def fp8_to_float(weight: Tensor) -> Tensor:
    """float8_e4m3fn -> float32 (NaN excepted), by moving bits: the CPU has no vector instruction for it.

    A float8's seven low bits are the top of a float32's exponent and mantissa, 2**120 too small; subnormals included.
    """
    bits = weight.view(torch.uint8).to(torch.int32)
    moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return moved.view(torch.float32) * 2.0**120


def _convert_inside(x: Tensor, weight: Tensor, scale: Tensor, form: EightBit) -> Tensor:
    product = (_materialize(x.float()).unsqueeze(-2) * to_float(weight, form)).sum(-1)
    return (product * scale.float()).to(x.dtype)


def _int8_kernel(x: Tensor, weight: Tensor, scale: Tensor, form: EightBit) -> Tensor:
    signed = weight if isinstance(form, Int8) and form.plain else (weight ^ INT8_ZERO).view(torch.int8)
    y: Tensor = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), signed, scale)
    return y.reshape(*x.shape[:-1], -1)


def _materialize(x: Tensor) -> Tensor:
    """x, in memory of its own.

    Inductor would fold the conversion from bfloat16 into the product's loop and make that 32 lanes wide, where
    converting the weight has no vector form: 2 times (int8) to 10 times (fp8) slower. It does not fold a scatter.
    """
    return torch.zeros_like(x).index_copy(-1, torch.arange(x.shape[-1]), x)
