"""Calls of `round_rows` and `linear`: products of activations with packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from furiosa_build.backends.native.builder import Builder
from furiosa_build.backends.native.values import Value
from furiosa_build.quant.scheme import scheme as find_scheme

FORMATS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "fp8": 4}
"""Numbers of a packed weight: a dtype, or a scheme's family -> its number in a call."""


class Product(NamedTuple):
    """One of the products of an x: out = x @ weight.T * scale + bias + residual.

    Attributes:
        weight: Packed.
        scheme: Of the weight, as text.
        out: [..., N].
        scale: [N, 1] or [1].
        bias: [N].
        residual: [..., N].
    """

    weight: Value
    scheme: str
    out: Value
    scale: Value | None = None
    bias: Value | None = None
    residual: Value | None = None

    @property
    def format(self) -> int:
        """The number of the weight's format in a call."""
        family = find_scheme(self.scheme).family
        return FORMATS[self.weight.dtype if family == "none" else family]

    @property
    def rounds(self) -> bool:
        """Whether x is rounded to the numbers of the weight's format."""
        return find_scheme(self.scheme).rounds_activations


def emit_linear(builder: Builder, x: Value, products: Sequence[Product], largest: Value | None = None) -> None:
    """All products of x. Those that take it as it is are one call; so are those that take it rounded alike.

    Args:
        builder: Where the calls go.
        x: [..., K].
        products: What it is multiplied by.
        largest: [..., 1], where x is a rank's share of it: of each token the largest magnitude over all ranks.
    """
    x = _matrix(builder, x)
    if plain := [product for product in products if not product.rounds]:
        _call(builder, x, None, plain)
    for number in dict.fromkeys(product.format for product in products if product.rounds):
        rows = builder.new(x.shape, "int8" if number == FORMATS["int8"] else "bfloat16")
        scales = builder.new(x.shape[:1], "float32")
        builder.call("round_rows", [x, None if largest is None else _vector(builder, largest), rows, scales], [number])
        _call(builder, rows, scales, [product for product in products if product.rounds and product.format == number])


def _call(builder: Builder, x: Value, x_scale: Value | None, products: Sequence[Product]) -> None:
    operands = [x, x_scale]
    for product in products:
        out = product.out.reshape((x.shape[0], product.out.shape[-1]))
        if out is None:
            raise ValueError("the output of a product is not a matrix")
        scale, bias = (None if v is None else _vector(builder, v) for v in (product.scale, product.bias))
        residual = None if product.residual is None else _matrix(builder, product.residual)
        operands += [product.weight, scale, bias, residual, out]
    builder.call("linear", operands, [product.format for product in products])


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
