"""Complex numbers as pairs of real ones, which are all that plans know: a last dimension holds the two parts.

So are a program's inputs and outputs: what one program returns as complex64 [...], the next is given as the same bytes,
which are float32 [..., 2].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from furiosa_build.backends.native.builder import refusal
from furiosa_build.ir.tensors import TensorSpec

aten = torch.ops.aten


class Complex:
    """A complex tensor. Operators of torch that are given one compute with its parts.

    Attributes:
        parts: [..., 2]: the real and the imaginary part.
    """

    def __init__(self, parts: Tensor) -> None:
        self.parts = parts

    @classmethod
    def __torch_function__(
        cls, operator: Any, types: Sequence[type], arguments: Sequence[Any] = (), named: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        if operator not in _FORMULAS:
            raise refusal(f"{operator} of complex numbers")
        return _FORMULAS[operator](*arguments, **(named or {}))


def as_real(spec: TensorSpec) -> TensorSpec:
    """An input or output as plans have it."""
    if not is_complex(spec):
        return spec
    return spec.model_copy(update={"dtype": "float32", "shape": [*spec.shape, 2]})


def is_complex(spec: TensorSpec) -> bool:
    """Whether an input or output is of complex numbers."""
    return spec.dtype == "complex64"


def _polar(magnitude: Tensor, angle: Tensor) -> Complex:
    return Complex(torch.stack([magnitude * angle.cos(), magnitude * angle.sin()], dim=-1))


def _mul(one: Any, other: Any) -> Complex:
    if not (isinstance(one, Complex) and isinstance(other, Complex)):
        pair, factor = (one, other) if isinstance(one, Complex) else (other, one)
        return Complex(pair.parts * (factor.unsqueeze(-1) if isinstance(factor, Tensor) else factor))
    (a, b), (c, d) = (number.parts.unbind(-1) for number in (one, other))
    return Complex(torch.stack([a * c - b * d, a * d + b * c], dim=-1))


def _unsqueeze(x: Complex, dim: int) -> Complex:
    return Complex(x.parts.unsqueeze(dim if dim >= 0 else dim - 1))


def _to(x: Complex, *, dtype: torch.dtype = torch.complex64, **where: Any) -> Complex:
    del where
    if dtype != torch.complex64:
        raise refusal(f"complex numbers as {dtype}")
    return x


MAKES_COMPLEX: Mapping[str, Callable[..., Complex]] = {
    "aten.polar.default": _polar,
    "aten.view_as_complex.default": Complex,
}
"""Operators, as graphs name them, that make complex numbers of real ones."""

_FORMULAS: Mapping[Any, Callable[..., Any]] = {
    aten.mul.Tensor: _mul,
    aten.unsqueeze.default: _unsqueeze,
    aten.to.dtype_layout: _to,
    aten.view_as_real.default: lambda x: x.parts,
}
