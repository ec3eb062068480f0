"""The `linear` kernel against products in float64, on every variant that this machine can run, AMX emulated."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from furiosa_build.backends.native.emit_linear import FORMATS
from furiosa_build.backends.native.library import Library
from furiosa_build.backends.native.packing import pack
from furiosa_build.quant.scheme import scheme as find_scheme
from tests.test_backends.test_native.calls import Call, run

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half of the distance between numbers, relative to the larger one."""
_TINIEST = {torch.float32: 2**-126, torch.bfloat16: 2**-126, torch.float16: 2**-24}
"""What may be flushed to zero, or the distance of subnormal numbers."""


class Weight(NamedTuple):
    """A weight as a call has it, and its numbers."""

    format: str
    packed: Tensor
    scale: Tensor | None
    exact: Tensor


def _weight(format_: str, n: int, k: int, seed: int = 0, tensor: bool = False) -> Weight:
    """A weight [n, k] of a dtype or a scheme."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n, k, generator=generator)
    if format_ not in ("int8", "fp8"):
        stored = drawn.to(getattr(torch, format_))
        return Weight(format_, pack(stored), None, stored.double())
    scale = (torch.rand(1 if tensor else n, 1, generator=generator) + 0.5).to(torch.bfloat16)
    if format_ == "int8":
        stored = torch.randint(-128, 128, (n, k), generator=generator).to(torch.int8)
    else:
        codes = torch.randint(0, 256, (n, k), generator=generator).to(torch.uint8)
        stored = torch.where(codes & 0x7F == 0x7F, codes - 1, codes).view(torch.float8_e4m3fn)
    return Weight(format_, pack(stored), scale.reshape(-1), stored.double() * scale.double())


def _call(x: Tensor, x_scale: Tensor | None, *products: tuple[Weight, Tensor | None, Tensor | None, Tensor]) -> Call:
    operands: list[Tensor | None] = [x, x_scale]
    for weight, bias, residual, out in products:
        operands += [weight.packed, weight.scale, bias, residual, out]
    return Call("linear", operands, [FORMATS[weight.format] for weight, *_ in products])


def _check(out: Tensor, x: Tensor, weight: Tensor, *added: Tensor | None, x_error: Tensor | float = 0.0) -> None:
    """Whether out is x @ weight.T and what is added, all in float64, but for rounding: of x by up to `x_error`, too."""
    wanted, size = x @ weight.T, x.abs() @ weight.abs().T
    x_error = (torch.zeros_like(x) + x_error) @ weight.abs().T
    for term in added:
        if term is not None:
            wanted, size = wanted + term.double(), size + term.double().abs()
    sums = 2**-24 * (8 + 4 * math.sqrt(x.shape[1]))
    tiny = _TINIEST[out.dtype] + 2**-126 * (x.abs().sum(1, keepdim=True) + weight.abs().sum(1))
    allowed = 1.01 * _ROUNDING[out.dtype] * wanted.abs() + sums * size + x_error + tiny
    limit = torch.finfo(out.dtype).max
    error = (out.double() - wanted.clamp(-limit, limit)).abs()
    too_large = wanted.abs() > 0.99 * limit
    assert ((error <= allowed) | too_large).all(), (error / allowed).max()


def _x_error(x: Tensor, format_: str) -> Tensor | float:
    """What numbers of x may be rounded by: bfloat16 that meets int8 by a 2^15th of the largest of 2048."""
    if x.dtype is not torch.bfloat16 or format_ != "int8":
        return 0.0
    pieces = x.double().abs().split(2048, 1)
    return 2**-15 * torch.cat([piece.amax(1, keepdim=True).expand(piece.shape) for piece in pieces], 1)


_SHAPES = {"m": st.integers(1, 40), "n": st.integers(1, 100), "k": st.integers(2, 700)}
_DRAWN = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("format_", FORMATS)
@_DRAWN
@given(
    dtype=st.sampled_from(_FLOATS),
    magnitude=st.sampled_from([0, 0, 30, -30]),
    seed=st.integers(0, 100),
    added=st.tuples(st.booleans(), st.booleans()),
    tensor=st.booleans(),
    **_SHAPES,
)
@example(m=13, n=32, k=2049, dtype=torch.bfloat16, magnitude=0, seed=0, added=(True, True), tensor=False)
@example(m=5, n=64, k=4100, dtype=torch.bfloat16, magnitude=0, seed=3, added=(False, False), tensor=False)
@example(m=9, n=33, k=5, dtype=torch.float16, magnitude=0, seed=1, added=(False, True), tensor=True)
@example(m=600, n=70, k=131, dtype=torch.bfloat16, magnitude=0, seed=2, added=(False, False), tensor=False)
def test_products(
    each_matrix_cpu: Library,
    format_: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    magnitude: int,
    seed: int,
    added: tuple[bool, bool],
    tensor: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = _weight(format_, n, k, seed, tensor)
    x = torch.randn(m, k, generator=generator)
    x = (x if dtype is torch.float16 else x * 10.0**magnitude).to(dtype)
    x[m // 2] = 0
    bias = torch.randn(n, generator=generator).to(dtype) if added[0] else None
    residual = torch.randn(m, n, generator=generator).to(dtype) if added[1] else None
    out = torch.full((m, n), torch.nan, dtype=dtype)
    run(each_matrix_cpu, _call(x, None, (weight, bias, residual, out)), threads=2)
    _check(out, x.double(), weight.exact, bias, residual, x_error=_x_error(x, format_))


@pytest.mark.parametrize("format_", FORMATS)
def test_a_row_is_the_same_among_any_number_of_rows(each_matrix_cpu: Library, format_: str) -> None:
    weight, x = _weight(format_, 72, 2100), torch.randn(600, 2100).to(torch.bfloat16)
    out = torch.empty(600, 72, dtype=torch.bfloat16)
    run(each_matrix_cpu, _call(x, None, (weight, None, None, out)), threads=2)
    for rows in (1, 2, 7, 12, 30, 257):
        few = torch.empty(rows, 72, dtype=torch.bfloat16)
        run(each_matrix_cpu, _call(x[-rows:], None, (weight, None, None, few)))
        assert few.equal(out[-rows:]), rows


def test_numbers_down_to_a_128th_of_the_largest_are_exact(each_matrix_cpu: Library) -> None:
    """Of bfloat16, where int8 is multiplied: one weight is not zero, so that the output is a number of x."""
    x = torch.cat([torch.linspace(-2, 2, 1024), torch.tensor([1.0, -2.0, 2.0**-6, -(2.0**-6)])]).to(torch.bfloat16)
    x = torch.where(x.abs() < 2**-6, torch.zeros_like(x), x)
    stored = torch.zeros(len(x), len(x), dtype=torch.int8).fill_diagonal_(1)
    for rows in (1, 20):
        out = torch.empty(rows, len(x), dtype=torch.bfloat16)
        weight = Weight("int8", pack(stored), None, stored.double())
        run(each_matrix_cpu, _call(x.repeat(rows, 1), None, (weight, None, None, out)))
        assert (out == x).all()


def test_products_of_several_weights(each_matrix_cpu: Library) -> None:
    for rows in (1, 40):
        x = torch.randn(rows, 300).to(torch.bfloat16)
        weights = [_weight("bfloat16", 70, 300), _weight("int8", 1, 300), _weight("fp8", 200, 300)]
        outs = [torch.empty(rows, len(w.exact), dtype=torch.bfloat16) for w in weights]
        run(
            each_matrix_cpu,
            _call(x, None, *((w, None, None, out) for w, out in zip(weights, outs, strict=True))),
            threads=2,
        )
        for weight, out in zip(weights, outs, strict=True):
            _check(out, x.double(), weight.exact, x_error=_x_error(x, weight.format))


def test_rows_that_lie_apart(each_matrix_cpu: Library) -> None:
    weight = _weight("bfloat16", 40, 64)
    for rows in (1, 30):
        x = torch.randn(rows, 200).to(torch.bfloat16)[:, 7:71]
        residual, out = torch.randn(rows, 90)[:, 3:43], torch.full((rows, 50), 7.0)
        run(each_matrix_cpu, _call(x, None, (weight, None, residual, out[:, 5:45])))
        _check(out[:, 5:45], x.double(), weight.exact, residual)
        assert (out[:, :5] == 7).all()
        assert (out[:, 45:] == 7).all()


@pytest.mark.parametrize("format_", FORMATS)
def test_numbers_that_are_none_stay_in_their_row(each_matrix_cpu: Library, format_: str) -> None:
    """K is odd: what lies behind a row is the next one's."""
    for rows in (3, 30):
        weight, x = _weight(format_, 33, 31), torch.randn(rows, 31).to(torch.bfloat16)
        x[1, 0], x[2, 30] = torch.nan, torch.inf
        out = torch.empty(rows, 33, dtype=torch.bfloat16)
        run(each_matrix_cpu, _call(x, None, (weight, None, None, out)))
        assert out[1].isnan().all()
        assert not out[2].isfinite().any()
        assert out[0].isfinite().all()
        assert out[3:].isfinite().all()


def test_a_weight_that_is_no_number(each_matrix_cpu: Library) -> None:
    codes = torch.zeros(2, 8, dtype=torch.uint8)
    codes[0, 3], codes[1, 5] = 0x7F, 0xFF
    weight = Weight("fp8", pack(codes.view(torch.float8_e4m3fn)), None, codes.double())
    for rows in (1, 30):
        out = torch.zeros(rows, 2)
        run(each_matrix_cpu, _call(torch.ones(rows, 8, dtype=torch.bfloat16), None, (weight, None, None, out)))
        assert out.isnan().all()


@pytest.mark.parametrize("text", ["int8-dynamic", "fp8-dynamic"])
@_DRAWN
@given(
    dtype=st.sampled_from(_FLOATS),
    magnitude=st.sampled_from([0, 30, -30]),
    of_all=st.booleans(),
    seed=st.integers(0, 100),
    **_SHAPES,
)
@example(m=300, n=40, k=513, dtype=torch.bfloat16, magnitude=0, of_all=False, seed=0)
def test_products_of_rounded_rows(
    each_matrix_cpu: Library,
    text: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    magnitude: int,
    of_all: bool,
    seed: int,
) -> None:
    family = text.partition("-")[0]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * torch.exp(torch.randn(m, 1, generator=generator))
    x = (x if dtype is torch.float16 else x * 10.0**magnitude).to(dtype)
    x[m // 2] = 0
    largest = x.abs().amax(-1, keepdim=True) * (2 if of_all else 1)
    weight = _weight(family, n, k, seed)
    rows = torch.empty(m, k, dtype=torch.int8 if family == "int8" else torch.bfloat16)
    scales, out = torch.empty(m), torch.empty(m, n, dtype=dtype)
    rounding = Call("round_rows", [x, largest.reshape(-1) if of_all else None, rows, scales], [FORMATS[family]])
    run(each_matrix_cpu, rounding, _call(rows, scales, (weight, None, None, out)), threads=2)
    own = find_scheme(text)
    exact = rows.double() * scales.double()[:, None]
    allowed = 3 * _ROUNDING[dtype] * exact.abs() + _TINIEST[dtype]  # the scheme rounds number * scale
    assert ((own.round(x, largest).double() - exact).abs() <= allowed).all()
    _check(out, exact, weight.exact)


@pytest.mark.parametrize("family", ["int8", "fp8"])
def test_rounded_rows_are_those_of_the_scheme(each_matrix_cpu: Library, family: str) -> None:
    """Every step between two numbers, ties included; a row of zeros; and rows with NaN or infinity."""
    x = torch.linspace(-1, 1, 4001).to(torch.bfloat16).repeat(4, 1)
    x[1] = 0
    x[2, 5], x[3, 6] = torch.nan, torch.inf
    rows = torch.empty(x.shape, dtype=torch.int8 if family == "int8" else torch.bfloat16)
    scales = torch.empty(4)
    run(each_matrix_cpu, Call("round_rows", [x, None, rows, scales], [FORMATS[family]]))
    wanted = find_scheme(f"{family}-dynamic").round(x, x.abs().amax(-1, keepdim=True))
    found = (rows.float() * scales[:, None]).to(torch.bfloat16)
    assert found[:2].equal(wanted[:2])
    assert found[2].isnan().all()
    assert not (rows[3].float() * scales[3]).isfinite().any()
