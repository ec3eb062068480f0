"""Calls of `round_rows` and `linear`: products of activations with packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from furiosa_build.backends.native.builder import Builder
from furiosa_build.backends.native.values import Value
from furiosa_build.quant.int4 import Int4
from furiosa_build.quant.scheme import scheme as find_scheme

FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "fp8": 4}
"""Numbers of a packed weight: a dtype, or a scheme's family -> its number in a call."""


class Product(NamedTuple):
    """One of the products of an x: out = x @ weight.T * scale + bias + residual.

    Attributes:
        weight: Packed.
        scheme: Of the weight, as text.
        out: [..., N].
        scale: [N, 1] or [1]; or, packed, those of groups.
        zero: The zero points of groups, packed.
        bias: [N].
        residual: [..., N].
    """

    weight: Value
    scheme: str
    out: Value
    scale: Value | None = None
    zero: Value | None = None
    bias: Value | None = None
    residual: Value | None = None

    @property
    def format(self) -> int:
        """The number of the weight's format in a call."""
        family = find_scheme(self.scheme).family
        return FORMATS[self.weight.dtype if family == "none" else family]

    @property
    def rounds_to(self) -> str | None:
        """The family to whose numbers x is rounded; None: it is taken as it is."""
        own = find_scheme(self.scheme)
        if not own.rounds_activations:
            return None
        return "int8" if isinstance(own, Int4) else own.family

    @property
    def group_size(self) -> int | None:
        """How many columns share a scale; None: all."""
        own = find_scheme(self.scheme)
        return own.group_size if isinstance(own, Int4) else None


def emit_linear(builder: Builder, x: Value, products: Sequence[Product], largest: Value | None = None) -> None:
    """All products of x. Those that take it rounded alike are one call; those with groups are one of their own.

    Args:
        builder: Where the calls go.
        x: [..., K].
        products: What it is multiplied by.
        largest: [..., 1], where x is a rank's share of it: of each token the largest magnitude over all ranks.
    """
    x = _matrix(builder, x)
    for family in sorted({product.rounds_to for product in products}, key=str):
        rows, scales = (x, None) if family is None else _rounded(builder, x, largest, family)
        alike = [product for product in products if product.rounds_to == family]
        _call(builder, rows, scales, [product for product in alike if product.group_size is None])
        _call(builder, rows, scales, [product for product in alike if product.group_size is not None])


def _rounded(builder: Builder, x: Value, largest: Value | None, family: str) -> tuple[Value, Value]:
    """The rows of x rounded to the numbers of a family, and their scales."""
    rows, scales = builder.new(x.shape, "int8" if family == "int8" else "bfloat16"), builder.new(x.shape[:1], "float32")
    operands = [x, None if largest is None else _vector(builder, largest), rows, scales]
    builder.call("round_rows", operands, [FORMATS[family]])
    return rows, scales


def _call(builder: Builder, x: Value, x_scale: Value | None, products: Sequence[Product]) -> None:
    """One call of products that all have groups, or all have none."""
    operands, numbers = [x, x_scale], []
    for product in products:
        out = product.out.reshape((x.shape[0], product.out.shape[-1]))
        if out is None:
            raise ValueError("the output of a product is not a matrix")
        bias = None if product.bias is None else _vector(builder, product.bias)
        scale = product.scale
        if scale is not None and scale.shape[-1] == 1:
            scale = _vector(builder, scale)
        residual = None if product.residual is None else _matrix(builder, product.residual)
        zero = [] if product.group_size is None else [product.zero]
        operands += [product.weight, scale, *zero, bias, residual, out]
        numbers.append(product.format if product.group_size is None else product.group_size)
    if numbers:
        builder.call("linear" if products[0].group_size is None else "linear_groups", operands, numbers)


def _matrix(builder: Builder, value: Value) -> Value:
    """The value [..., size] as [rows, size] whose rows are contiguous: copied, if it must be."""
    size = value.shape[-1]
    matrix = value.reshape((value.numel // size, size))
    if matrix is not None and (size == 1 or matrix.stride[1] == 1):
        return matrix
    return _copied(builder, value, (value.numel // size, size))


def _vector(builder: Builder, value: Value) -> Value:
    """The elements of the value, one behind the other."""
    vector = value.reshape((value.numel,))
    if vector is not None and (vector.numel == 1 or vector.stride[0] == 1):
        return vector
    return _copied(builder, value, (value.numel,))


def _copied(builder: Builder, value: Value, shape: tuple[int, ...]) -> Value:
    copy = builder.new(value.shape, value.dtype)
    builder.call("copy", [value, copy])
    result = copy.reshape(shape)
    assert result is not None
    return result
