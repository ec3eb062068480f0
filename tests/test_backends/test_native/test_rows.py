"""Kernels that go through rows, and those that choose rows by number, against torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from furiosa_build.backends.native.library import Library
from tests.test_backends.test_native.calls import Call, run

_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
_each_dtype = pytest.mark.parametrize("dtype", _TOLERANCE, ids=str)


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _check(found: Tensor, wanted: Tensor, spread: float = 1.0) -> None:
    """`spread`: how large the numbers are that rounding errors come from."""
    tolerance = _TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * 0.3 * spread, equal_nan=True)


@_each_dtype
@pytest.mark.parametrize("size", [1, 7, 64, 2051])
def test_rms_norm(each_width: Library, dtype: torch.dtype, size: int) -> None:
    x, weight, out = (
        _draw(5, 3, size, dtype=dtype),
        _draw(size, dtype=dtype, seed=1),
        torch.empty(5, 3, size, dtype=dtype),
    )
    for offset in (0.0, 1.0):
        run(each_width, Call("norm", [x, None, weight, None, out, None], [0, 0], [1e-5, offset]))
        _check(out, F.rms_norm(x.double(), (size,), weight.double() + offset, 1e-5))
    run(each_width, Call("norm", [x, None, None, None, out, None], [0, 0], [1e-5, 0.0]))
    _check(out, F.rms_norm(x.double(), (size,), None, 1e-5))


@_each_dtype
def test_layer_norm_of_a_sum(each_width: Library, dtype: torch.dtype) -> None:
    x, residual, weight, bias = (
        _draw(*shape, dtype=dtype, seed=n) for n, shape in enumerate([(40, 130), (40, 130), (130,), (130,)])
    )
    out, total = torch.empty_like(x), torch.empty_like(x)
    run(each_width, Call("norm", [x, residual, weight, bias, out, total], [1, 0], [1e-6, 0.0]))
    assert torch.equal(total, x + residual)
    _check(out, F.layer_norm(total.double(), (130,), weight.double(), bias.double(), 1e-6))


def test_the_norm_of_llama_is_bit_for_bit_in_bfloat16(each_width: Library) -> None:
    x, weight = _draw(9, 512, dtype=torch.bfloat16), _draw(512, dtype=torch.bfloat16, seed=1)
    out = torch.empty_like(x)
    run(each_width, Call("norm", [x, None, weight, None, out, None], [0, 1], [1e-5, 0.0]))
    normalized = x.float() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-5).float()
    wanted = weight * normalized.bfloat16()
    assert (out != wanted).float().mean() < 0.002  # where float32 rounded to the other side


def test_norm_of_rows_apart(library: Library) -> None:
    whole = _draw(4, 6, 3, 70)
    x, out = whole[:, :, 1], torch.zeros(6, 4, 70).transpose(0, 1)
    run(library, Call("norm", [x, None, None, None, out, None], [1, 0], [1e-5, 0.0]))
    _check(out, F.layer_norm(x.double(), (70,), eps=1e-5))


@_each_dtype
@pytest.mark.parametrize("size", [1, 5, 16, 1000])
def test_softmax(each_width: Library, dtype: torch.dtype, size: int) -> None:
    x = _draw(3, 11, size, dtype=dtype) * 8
    x[0, 0] = 60_000.0 if dtype is torch.float16 else 1e30
    x[1, :3, : size // 2] = -math.inf
    x[2, 5] = -math.inf
    x[2, 6, 0] = math.nan
    for logarithm, function in enumerate((torch.softmax, torch.log_softmax)):
        out = torch.empty_like(x)
        run(each_width, Call("softmax", [x, out], [logarithm]))
        _check(out, function(x.double(), -1))
        turned = torch.empty(size, 11, 3, dtype=dtype).permute(2, 1, 0)
        run(each_width, Call("softmax", [x.mT.contiguous().mT, turned], [logarithm]))
        assert torch.equal(turned.nan_to_num(), out.nan_to_num())


@_each_dtype
@pytest.mark.parametrize("kind", [0, 1])
def test_rotary(each_width: Library, dtype: torch.dtype, kind: int) -> None:
    x = _draw(2, 9, 4, 48, dtype=dtype).transpose(1, 2)  # [batch, heads, tokens, size]
    for rotated in (48, 32, 2):
        angle = _draw(2, 1, 9, rotated, seed=3)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        out = torch.empty(2, 4, 9, 48, dtype=dtype)
        run(each_width, Call("rotary", [x, cos.expand(2, 4, 9, rotated), sin.expand(2, 4, 9, rotated), out], [kind]))
        part = x[..., :rotated].double()
        if kind == 0:
            first, second = part.chunk(2, -1)
            turned = torch.cat([-second, first], -1)
        else:
            turned = torch.stack([-part[..., 1::2], part[..., ::2]], -1).flatten(-2)
        _check(out[..., :rotated], part * cos.double() + turned * sin.double())
        assert torch.equal(out[..., rotated:], x[..., rotated:])


_REDUCTIONS = {0: torch.sum, 1: torch.mean, 2: torch.amax, 3: torch.amin}


@_each_dtype
@pytest.mark.parametrize("kind", _REDUCTIONS)
def test_reduce(each_width: Library, dtype: torch.dtype, kind: int) -> None:
    whole = _draw(6, 5, 3, 700, dtype=dtype)
    whole[0, 0, 0, 3] = math.nan
    for x, num_dims in ((whole, 1), (whole, 3), (whole.permute(3, 0, 2, 1), 2), (whole.permute(3, 2, 1, 0), 1)):
        dims = tuple(range(4 - num_dims, 4))
        out = torch.empty(x.shape[: 4 - num_dims], dtype=dtype)
        run(each_width, Call("reduce", [x, out], [kind, num_dims]))
        wanted = _REDUCTIONS[kind](x.double(), dim=dims)
        spread = 1.0 if kind != 0 else math.prod(x.shape[4 - num_dims :]) ** 0.5
        _check(out, wanted, spread)


def test_reduce_of_integers_and_places(each_width: Library) -> None:
    x = torch.randint(-50, 50, (4, 3, 900))
    for kind, function in ((0, torch.sum), (2, torch.amax), (3, torch.amin)):
        out = torch.empty(4, dtype=torch.int64)
        run(each_width, Call("reduce", [x, out], [kind, 2]))
        assert torch.equal(out, function(x, dim=(1, 2)))
    any_of, out = x > 48, torch.empty(4, 3, dtype=torch.bool)
    run(each_width, Call("reduce", [any_of, out], [2, 1]))
    assert torch.equal(out, any_of.any(-1))
    floats = x.float()
    floats[2, 1, 300] = math.nan
    floats[3, 1] = -math.inf
    place = torch.empty(4, 3, dtype=torch.int64)
    run(each_width, Call("reduce", [floats, place], [4, 1]))
    assert torch.equal(place, floats.argmax(-1))


def _packed(weight: Tensor) -> Tensor:
    """As packing.py describes it, made another way."""
    unit = 4 // weight.element_size()
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // 32) * 32, -(-columns // unit) * unit, dtype=weight.dtype)
    padded[:rows, :columns] = weight
    return padded.view(-1, 32, padded.shape[1] // unit, unit).transpose(1, 2).contiguous().clone()


@_each_dtype
@pytest.mark.parametrize("packs", [False, True])
def test_embedding(each_width: Library, dtype: torch.dtype, packs: bool) -> None:
    for rows, columns in ((100, 64), (33, 7), (1, 1)):
        table = _draw(rows, columns, dtype=dtype)
        ids = torch.randint(0, rows, (3, 41))
        weight = _packed(table).squeeze(-1) if dtype is torch.float32 else _packed(table)
        for out in (torch.empty(3, 41, columns, dtype=dtype), torch.empty(3, 41, columns, 2)[..., 1]):
            run(each_width, Call("embedding", [weight if packs else table, ids, out]))
            assert torch.equal(out, table[ids].to(out.dtype))
        out = torch.zeros(2, columns, dtype=dtype)
        run(each_width, Call("embedding", [weight if packs else table, torch.tensor([-1, 10**12]), out]))
        assert out.isnan().all()


@_each_dtype
@pytest.mark.parametrize("shape", [(64, 128), (33, 7), (1, 1), (100, 2)])
def test_unpack(each_width: Library, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight, out = _draw(*shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
    packed = _packed(weight).squeeze(-1) if dtype is torch.float32 else _packed(weight)
    run(each_width, Call("unpack", [packed, out]))
    assert torch.equal(out, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_gather(each_width: Library, dtype: torch.dtype) -> None:
    x = torch.randint(0, 2**15, (5, 6, 7)).to(dtype)
    for view in (x, x.permute(2, 0, 1), x[:, ::2]):
        for dim in range(3):
            size = view.shape[dim]
            index = torch.randint(-size, size, (3, 4))
            wanted = view.index_select(dim, index.flatten() % size).unflatten(dim, (3, 4))
            out = torch.empty(wanted.shape, dtype=dtype)
            run(each_width, Call("gather", [view, index, out], [0, dim]))
            assert torch.equal(out, wanted)
            shape = [2 if place == dim else number for place, number in enumerate(view.shape)]
            index = torch.randint(0, size, shape)
            out = torch.empty(shape, dtype=dtype)
            run(each_width, Call("gather", [view, index, out], [1, dim]))
            assert torch.equal(out, view.gather(dim, index))


def test_gather_of_what_is_not_there(library: Library) -> None:
    x, out = torch.ones(4, 3), torch.zeros(3, 3)
    run(library, Call("gather", [x, torch.tensor([4, -5, 0]), out], [0, 0]))
    assert out[:2].isnan().all()
    assert (out[2] == 1).all()


@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 70),
    st.integers(1, 150),
    st.integers(1, 600),
    st.booleans(),
    st.booleans(),
    st.sampled_from(list(_TOLERANCE)),
)
def test_matmul(
    library: Library, batch: list[int], m: int, n: int, k: int, turn_a: bool, turn_b: bool, dtype: torch.dtype
) -> None:
    a = _draw(*batch, k, m, dtype=dtype).mT if turn_a else _draw(*batch, m, k, dtype=dtype)
    b = _draw(n, k, dtype=dtype, seed=1).mT if turn_b else _draw(k, n, dtype=dtype, seed=1)
    for width in (0, 3):
        library.limit_cpu(width)
        out = torch.empty(*batch, m, n)
        run(library, Call("matmul", [a, b.expand(*batch, k, n), out]))
        wanted = a.double() @ b.double()
        assert (out - wanted).abs().max() <= 2e-6 * math.sqrt(k) * 4
    library.limit_cpu(0)


def test_matmul_rounds(library: Library) -> None:
    a, b = _draw(3, 40, 64, dtype=torch.bfloat16), _draw(3, 64, 24, dtype=torch.bfloat16, seed=1)
    out = torch.empty(3, 24, 40, dtype=torch.bfloat16).mT
    run(library, Call("matmul", [a, b, out]))
    _check(out, a.double() @ b.double())


@_each_dtype
@pytest.mark.parametrize(("size", "count"), [(1, 1), (8, 2), (8, 8), (130, 6)])
def test_topk(each_width: Library, dtype: torch.dtype, size: int, count: int) -> None:
    whole = torch.randperm(5 * 3 * size, generator=torch.Generator().manual_seed(2)).reshape(5, 3, size)
    x = (whole / 8 - 40).to(dtype)  # few of them are equal
    x[0, 0, size // 2], x[1, 0, 0], x[2, 0] = math.nan, math.inf, -math.inf
    for rows in (x, x.transpose(0, 1)):
        values, places = (
            torch.empty(*rows.shape[:-1], count, dtype=dtype),
            torch.empty(*rows.shape[:-1], count, dtype=torch.int64),
        )
        run(each_width, Call("topk", [rows, values, places]))
        first = rows.double().nan_to_num(nan=1e6, posinf=1e5, neginf=-1e5).sort(stable=True, dim=-1, descending=True)
        assert torch.equal(places, first.indices[..., :count])
        assert torch.equal(values.nan_to_num(), rows.gather(-1, places).nan_to_num())


@_each_dtype
def test_scatter(each_width: Library, dtype: torch.dtype) -> None:
    x, index = _draw(4, 3, 17, dtype=dtype), torch.randint(17, (4, 3, 5), generator=torch.Generator().manual_seed(1))
    out = torch.empty(3, 4, 17, dtype=dtype).transpose(0, 1)
    run(each_width, Call("scatter", [x, index, out], [], [0.5]))
    assert torch.equal(out, x.scatter(-1, index, 0.5))
