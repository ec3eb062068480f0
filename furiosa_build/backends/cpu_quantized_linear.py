"""Products with 8-bit weights as they are fastest on a CPU: three formulations, by the rows of x."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from furiosa_build.quant.eight_bit import EightBit
from furiosa_build.quant.fp8 import Fp8
from furiosa_build.quant.int8 import ZERO, Int8
from furiosa_build.quant.ops import quantized_linear_reference
from furiosa_build.quant.scheme import scheme as find_scheme

_VECTOR_ROWS = {"int8": 2, "fp8": 8}
"""Up to this many rows of activations, converting the weight inside the product is fastest."""
_INT8_KERNEL_ROWS = 32
"""Up to this many rows, torch's kernel for int8 weights beats a product with a converted copy of them.

Both bounds by measurement at 2048 x 8192 on one core with AVX-512; `benchmarks/block.py` shows the effect.
"""
_INT8_KERNEL_COLUMNS = 16
"""Numbers of a row of bfloat16 that the kernel reads at a time, beyond the row's end if they do not divide it."""


def lower_quantized_linear(x: Tensor, weight: list[Tensor], largest: Tensor | None, scheme: str) -> Tensor:
    """`furiosa::quantized_linear`. Schemes that have no formulation here are computed as their reference."""
    own = find_scheme(scheme)
    if not isinstance(own, Fp8 | Int8):
        return quantized_linear_reference(x, weight, largest, scheme)
    if own.rounds_activations:
        x = _round(x, x.abs().amax(-1, keepdim=True) if largest is None else largest, own)
    stored, scale = weight
    columns = x.shape[-1]
    numbers, scale = stored[:, :columns], scale.reshape(-1)
    rows = x.numel() // columns
    if rows <= _VECTOR_ROWS[own.family]:
        return _convert_inside(x, numbers, scale, own)
    if isinstance(own, Int8) and rows <= _INT8_KERNEL_ROWS and columns % _INT8_KERNEL_COLUMNS == 0 and not own.tensor:
        return _int8_kernel(x, numbers, scale, own)
    return F.linear(x, to_float(numbers, own).to(x.dtype)) * scale


def to_float(numbers: Tensor, scheme: EightBit) -> Tensor:
    """Stored numbers as float32, before scaling: exact."""
    return fp8_to_float(numbers) if isinstance(scheme, Fp8) else scheme.to_float(numbers)


def fp8_to_float(numbers: Tensor) -> Tensor:
    """float8_e4m3fn -> float32 (NaN excepted), by moving bits: the CPU has no vector instruction for it.

    A float8's seven low bits are the top of a float32's exponent and mantissa, 2**120 too small; subnormals included.
    """
    bits = numbers.view(torch.uint8).to(torch.int32)
    moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
    return moved.view(torch.float32) * 2.0**120


def _round(x: Tensor, largest: Tensor, scheme: Fp8 | Int8) -> Tensor:
    if isinstance(scheme, Int8):
        return scheme.round(x, largest)
    numbers, scale = scheme.steps(x, largest)
    return fp8_to_float(numbers).to(x.dtype) * scale


def _convert_inside(x: Tensor, numbers: Tensor, scale: Tensor, scheme: EightBit) -> Tensor:
    product = (_materialize(x.float()).unsqueeze(-2) * to_float(numbers, scheme)).sum(-1)
    return (product * scale.float()).to(x.dtype)


def _int8_kernel(x: Tensor, numbers: Tensor, scale: Tensor, scheme: Int8) -> Tensor:
    signed = numbers if scheme.plain else (numbers ^ ZERO).view(torch.int8)
    y: Tensor = torch.ops.aten._weight_int8pack_mm(x.reshape(-1, x.shape[-1]), signed, scale)
    return y.reshape(*x.shape[:-1], -1)


def _materialize(x: Tensor) -> Tensor:
    """x, in memory of its own.

    Inductor would fold the conversion from bfloat16 into the product's loop and make that 32 lanes wide, where
    converting the weight has no vector form: 2 times (int8) to 10 times (fp8) slower. It does not fold a scatter.
    """
    return torch.zeros_like(x).index_copy(-1, torch.arange(x.shape[-1]), x)
