"""The `linear_groups` kernel against products in float64, on every variant that this machine can run."""

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
from furiosa_build.backends.native.packing import pack, unpack
from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.int4 import GROUP_SIZES, Int4
from tests.test_backends.test_native.calls import Call, run

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half of the distance between numbers, relative to the larger one."""
_TINIEST = {torch.float32: 2**-126, torch.bfloat16: 2**-126, torch.float16: 2**-24}


class Weight(NamedTuple):
    """A weight as a call has it, and its numbers.

    Attributes:
        exact: [N, K].
        size: [N, K]: the magnitudes of what a kernel may add up for each number, zero points apart.
    """

    group_size: int
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    exact: Tensor
    size: Tensor


def _weight(group_size: int, n: int, k: int, seed: int, dtype: torch.dtype, asymmetric: bool) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    own = Int4(group_size, asymmetric)
    layouts = own.parts(Layout(str(dtype).removeprefix("torch."), (n, k)))
    parts = {
        name: torch.randint(-(2**31), 2**31, layout.shape, generator=generator, dtype=torch.int64).to(torch.int32)
        for name, layout in layouts.items()
        if layout.dtype == "int32"
    }
    scale = (torch.rand(layouts["weight_scale"].shape, generator=generator) + 0.5).to(dtype)
    parts["weight_scale"] = scale
    exact = own.dequantize(
        {name: p.double() if name == "weight_scale" else p for name, p in parts.items()}, torch.float64
    )
    zero = parts.get("weight_zero_point")
    wide = scale.double().repeat_interleave(group_size, 1)
    return Weight(
        group_size,
        pack(parts["weight_packed"]),
        pack(scale) if k > group_size else scale.reshape(-1),
        None if zero is None else pack(zero),
        exact,
        exact.abs() + 16 * wide,
    )


def _call(x: Tensor, x_scale: Tensor | None, *products: tuple[Weight, Tensor | None, Tensor | None, Tensor]) -> Call:
    operands: list[Tensor | None] = [x, x_scale]
    for weight, bias, residual, out in products:
        operands += [weight.packed, weight.scale, weight.zero, bias, residual, out]
    return Call("linear_groups", operands, [weight.group_size for weight, *_ in products])


def _check(out: Tensor, x: Tensor, weight: Weight, *added: Tensor | None, x_error: Tensor | float = 0.0) -> None:
    """Whether out is x @ weight.T and what is added, all in float64, but for rounding: of x by up to `x_error`, too."""
    wanted, size = x @ weight.exact.T, x.abs() @ weight.size.T
    x_error = (torch.zeros_like(x) + x_error) @ weight.exact.abs().T
    for term in added:
        if term is not None:
            wanted, size = wanted + term.double(), size + term.double().abs()
    sums = 2**-24 * (8 + 4 * math.sqrt(x.shape[1]))
    tiny = _TINIEST[out.dtype] + 2**-126 * 16 * (x.abs().sum(1, keepdim=True) + weight.size.sum(1))
    allowed = 1.01 * _ROUNDING[out.dtype] * wanted.abs() + sums * size + x_error + tiny
    limit = torch.finfo(out.dtype).max
    error = (out.double() - wanted.clamp(-limit, limit)).abs()
    assert ((error <= allowed) | (wanted.abs() > 0.99 * limit)).all(), (error / allowed).max()


def _x_error(x: Tensor, weight: Weight) -> Tensor | float:
    """What numbers of x may be rounded by: bfloat16 by a 2^15th of the largest of a group."""
    if x.dtype is not torch.bfloat16:
        return 0.0
    groups = x.double().abs().unflatten(1, (-1, weight.group_size))
    return 2**-15 * groups.amax(2, keepdim=True).expand(groups.shape).flatten(1)


_DRAWN = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
_SHAPES = {"m": st.integers(1, 40), "n": st.integers(1, 12), "groups": st.integers(1, 9), "seed": st.integers(0, 100)}


@pytest.mark.parametrize("asymmetric", [False, True])
@_DRAWN
@given(
    group_size=st.sampled_from(GROUP_SIZES),
    dtype=st.sampled_from(_FLOATS),
    stored=st.sampled_from(_FLOATS),
    magnitude=st.sampled_from([0, 0, 30, -30]),
    added=st.tuples(st.booleans(), st.booleans()),
    **_SHAPES,
)
@example(
    m=13,
    n=5,
    groups=17,
    seed=0,
    group_size=32,
    dtype=torch.bfloat16,
    stored=torch.bfloat16,
    magnitude=0,
    added=(True, True),
)
@example(
    m=1,
    n=4,
    groups=3,
    seed=0,
    group_size=128,
    dtype=torch.bfloat16,
    stored=torch.bfloat16,
    magnitude=0,
    added=(False, True),
)
@example(
    m=600,
    n=9,
    groups=5,
    seed=2,
    group_size=64,
    dtype=torch.bfloat16,
    stored=torch.bfloat16,
    magnitude=0,
    added=(False, False),
)
def test_products(
    each_cpu: Library,
    group_size: int,
    asymmetric: bool,
    m: int,
    n: int,
    groups: int,
    seed: int,
    dtype: torch.dtype,
    stored: torch.dtype,
    magnitude: int,
    added: tuple[bool, bool],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n, k = n * 8 if asymmetric else n * 7, groups * group_size
    weight = _weight(group_size, n, k, seed, stored, asymmetric)
    x = torch.randn(m, k, generator=generator)
    x = (x if dtype is torch.float16 else x * 10.0**magnitude).to(dtype)
    x[m // 2] = 0
    bias = torch.randn(n, generator=generator).to(dtype) if added[0] else None
    residual = torch.randn(m, n, generator=generator).to(dtype) if added[1] else None
    out = torch.full((m, n), torch.nan, dtype=dtype)
    run(each_cpu, _call(x, None, (weight, bias, residual, out)), threads=2)
    _check(out, x.double(), weight, bias, residual, x_error=_x_error(x, weight))


@pytest.mark.parametrize("asymmetric", [False, True])
@_DRAWN
@given(dtype=st.sampled_from(_FLOATS), group_size=st.sampled_from(GROUP_SIZES), **_SHAPES)
@example(m=300, n=5, groups=4, seed=0, dtype=torch.bfloat16, group_size=128)
def test_products_of_rounded_rows(
    each_cpu: Library, asymmetric: bool, m: int, n: int, groups: int, seed: int, dtype: torch.dtype, group_size: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = groups * group_size
    weight = _weight(group_size, n * 8, k, seed, torch.bfloat16, asymmetric)
    x = (torch.randn(m, k, generator=generator) * torch.exp(torch.randn(m, 1, generator=generator))).to(dtype)
    x[m // 2] = 0
    rows, scales, out = torch.empty(m, k, dtype=torch.int8), torch.empty(m), torch.empty(m, n * 8, dtype=dtype)
    rounding = Call("round_rows", [x, None, rows, scales], [FORMATS["int8"]])
    run(each_cpu, rounding, _call(rows, scales, (weight, None, None, out)), threads=2)
    _check(out, rows.double() * scales.double()[:, None], weight)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize(("group_size", "asymmetric"), [(32, False), (64, True), (128, False)])
def test_a_row_is_the_same_among_any_number_of_rows(
    each_cpu: Library, group_size: int, asymmetric: bool, x_dtype: torch.dtype
) -> None:
    weight = _weight(group_size, 72, 1152, 0, torch.bfloat16, asymmetric)
    x = (torch.randn(300, 1152, generator=torch.Generator().manual_seed(1)) * 40).clamp(-127, 127).to(x_dtype)
    scale = torch.rand(300) if x_dtype is torch.int8 else None
    out = torch.empty(300, 72)
    run(each_cpu, _call(x, scale, (weight, None, None, out)), threads=2)
    for rows in (1, 3, 5, 9, 30, 257):
        few = torch.empty(rows, 72)
        own = None if scale is None else scale[-rows:].clone()
        run(each_cpu, _call(x[-rows:], own, (weight, None, None, few)))
        assert few.equal(out[-rows:]), rows


def test_products_of_several_weights_of_rows_that_lie_apart(each_cpu: Library) -> None:
    for rows in (1, 40):
        x = torch.randn(rows, 400).to(torch.bfloat16)[:, 7:263]
        weights = [_weight(size, 40, 256, size, torch.bfloat16, size == 64) for size in GROUP_SIZES]
        outs = [torch.full((rows, 60), 7.0) for _ in weights]
        products = [(weight, None, None, out[:, 5:45]) for weight, out in zip(weights, outs, strict=True)]
        run(each_cpu, _call(x, None, *products), threads=2)
        for weight, out in zip(weights, outs, strict=True):
            _check(out[:, 5:45], x.double(), weight, x_error=_x_error(x, weight))
            assert (out[:, :5] == 7).all()
            assert (out[:, 45:] == 7).all()


def test_numbers_that_are_none_stay_in_their_row(each_cpu: Library) -> None:
    for rows in (3, 30):
        weight, x = _weight(32, 40, 96, 0, torch.bfloat16, True), torch.randn(rows, 96).to(torch.bfloat16)
        x[1, 40], x[2, 95] = torch.nan, torch.inf
        out = torch.empty(rows, 40, dtype=torch.bfloat16)
        run(each_cpu, _call(x, None, (weight, None, None, out)))
        assert out[1].isnan().all()
        assert not out[2].isfinite().any()
        assert out[0].isfinite().all()
        assert out[3:].isfinite().all()


def test_what_is_packed_comes_back_bit_for_bit() -> None:
    own, weight = Int4(32, True), torch.randn(72, 224).to(torch.bfloat16)
    for name, part in own.quantize(weight).items():
        assert unpack(pack(part), Layout.of(part)).equal(part), name
