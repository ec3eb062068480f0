"""What inductor is given for a product with a quantized weight: three formulations, by how many rows there are."""

from __future__ import annotations

import pytest
import torch
from quantized import FORMS
from test_quant.layers import operands, random_weight, sums_of_products

from furiosa_build.backends.cpu_quantized_linear import lower_quantized_linear, to_float
from furiosa_build.quant.fp8 import Fp8
from furiosa_build.quant.int8 import Int8
from furiosa_build.quant.ops import quantized_linear_reference
from furiosa_build.quant.scheme import scheme as find_scheme

FLOATS = [torch.float32, torch.bfloat16]
LEADING = [(), (1,), (2,), (1, 2), (3,), (8,), (3, 3), (32,), (33,), (2, 20)]


def test_every_float8_becomes_the_number_that_torch_says_it_is() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = every_byte.float()
    is_number = ~expected.isnan()
    assert is_number.sum() == 254, "0x7f and 0xff are not numbers, and quantize never writes them"
    found = to_float(every_byte, Fp8())
    assert found.dtype == torch.float32
    assert found[is_number].equal(expected[is_number])
    assert found.signbit()[is_number].equal(expected.signbit()[is_number]), "minus zero"
    assert (found[1:8] > 0).all(), "subnormal numbers"
    assert found.bfloat16().float()[is_number].equal(expected[is_number]), "exact in bfloat16 as well"


def test_every_packed_byte_becomes_its_integer() -> None:
    found = to_float(torch.arange(256, dtype=torch.uint8), Int8())
    assert found.dtype == torch.float32
    assert found.tolist() == list(range(-128, 128))


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [32, 37])
@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_product_is_that_of_the_dequantized_weight(
    scheme: str, columns: int, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    stored = find_scheme(scheme).quantize(random_weight(10, columns, dtype))
    x = torch.randn((*leading, columns), generator=torch.Generator().manual_seed(1)).to(dtype)
    found = lower_quantized_linear(x, operands(scheme, stored, columns), None, scheme)
    expected, added_up = sums_of_products(scheme, stored, x)
    assert found.dtype == dtype
    assert found.shape == (*leading, 10)
    # The sum is in float32 or better, whatever the order: so many units of 2**-24 of what is added up. Then up to two
    # roundings to dtype follow, of the product, and of the product with the scale.
    allowed = columns * 2.0**-24 * added_up + torch.finfo(dtype).eps / 2 * 1.01 * expected.abs() * 2
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("scheme", FORMS)
def test_all_formulations_agree_with_the_reference(scheme: str) -> None:
    """A sequence's numbers do not jump when it moves from a bucket of few rows to one of many."""
    family = scheme.partition("-")[0]
    stored = find_scheme(family).quantize(random_weight(10, 64))
    numbers, scale = operands(family, stored, 64)
    if "plain" in scheme:
        numbers = (numbers ^ 128).view(torch.int8)
    if "tensor" in scheme:
        scale = scale[:1].reshape(1)
    x = torch.randn((64, 64), generator=torch.Generator().manual_seed(2))
    expected = quantized_linear_reference(x, [numbers, scale], None, scheme)
    for rows in (1, 2, 3, 8, 9, 32, 33, 64):
        # float32 sums of 64 numbers in another order.
        found = lower_quantized_linear(x[:rows], [numbers, scale], None, scheme)
        torch.testing.assert_close(found, expected[:rows], rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("scheme", ["fp8-dynamic", "int8-dynamic"])
def test_the_largest_of_all_ranks_sets_the_scale(scheme: str) -> None:
    family = scheme.partition("-")[0]
    weight = operands(family, find_scheme(family).quantize(random_weight(10, 32)), 32)
    x = torch.randn((40, 32), generator=torch.Generator().manual_seed(3))
    halves, largest = x.chunk(2, dim=1), x.abs().amax(-1, keepdim=True)
    numbers, scale = weight
    parts = [
        lower_quantized_linear(half, [part.contiguous(), scale], largest, scheme)
        for half, part in zip(halves, numbers.chunk(2, dim=1), strict=True)
    ]
    whole = lower_quantized_linear(x, weight, None, scheme)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))
