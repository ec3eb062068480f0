from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from compressed_tensors.compressors.base import compress_module, decompress_module
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from quantized import FORMS, library_scheme
from torch import Tensor, nn

from furiosa_build.quant.fp8 import Fp8
from furiosa_build.quant.int8 import Int8, packed_columns
from furiosa_build.quant.linear import QuantizedLinear, to_float
from furiosa_build.quant.scheme import scheme as find_scheme

FP8 = torch.float8_e4m3fn
FLOATS = [torch.float32, torch.bfloat16]


def test_every_float8_becomes_the_number_that_torch_says_it_is() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(FP8)
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


def test_packed_rows_are_whole_words() -> None:
    assert [packed_columns(n) for n in (1, 4, 5, 8)] == [4, 4, 8, 8]


def make(scheme: str, columns: int, *, bias: bool, dtype: torch.dtype) -> tuple[QuantizedLinear, dict[str, Tensor]]:
    """A layer with 10 outputs, and its parameters as a checkpoint has them."""
    generator = torch.Generator().manual_seed(columns)
    with torch.device("meta"):
        original = nn.Linear(columns, 10, bias=bias, dtype=dtype)
    weight = torch.randn((10, columns), generator=generator).to(dtype)
    stored = find_scheme(scheme).quantize(weight)
    if bias:
        stored["bias"] = torch.randn(10, generator=generator).to(dtype)
    return QuantizedLinear(original, find_scheme(scheme)), stored


def call(layer: QuantizedLinear, stored: dict[str, Tensor], x: Tensor) -> Tensor:
    """The layer with the parameters it declares, bytes as the runtime views them."""
    parameters = {
        name: stored[name].view(torch.uint8) if name == "weight_packed" else stored[name]
        for name, _ in layer.named_parameters()
    }
    for name, parameter in layer.named_parameters():
        assert (parameters[name].dtype, parameters[name].shape) == (parameter.dtype, parameter.shape)
    result: Tensor = torch.func.functional_call(layer, parameters, (x,))
    return result


LEADING = [(), (1,), (2,), (1, 2), (3,), (8,), (3, 3), (32,), (33,), (2, 20)]
"""Few rows and many: a product is formulated in up to three ways, by how many rows there are."""


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("columns", "bias"), [(32, False), (37, True)], ids=["32", "37-bias"])
@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_product_is_that_of_the_dequantized_weight(
    scheme: str, columns: int, bias: bool, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    layer, stored = make(scheme, columns, bias=bias, dtype=dtype)
    x = torch.randn((*leading, columns), generator=torch.Generator().manual_seed(1)).to(dtype)
    found = call(layer, stored, x)

    # In float64 from the stored numbers, by torch's own conversion.
    scale = stored["weight_scale"].double()
    if scheme == "fp8":
        weight = stored["weight"].to(torch.float64) * scale
    else:
        weight = (stored["weight_packed"].view(torch.uint8)[:, :columns].double() - 128) * scale
    offset = stored["bias"].double() if bias else torch.zeros(10, dtype=torch.float64)
    expected = x.double() @ weight.T + offset

    assert found.dtype == dtype
    assert found.shape == (*leading, 10)
    # The sum is in float32 or better, whatever the order: so many units of 2**-24 of what is added up. Then up to three
    # roundings to dtype follow, of the product, of the product with the scale, and of the sum with the bias.
    added_up = x.double().abs() @ weight.T.abs()
    rounded = (expected - offset).abs() * 2 + expected.abs()
    allowed = columns * 2.0**-24 * added_up + torch.finfo(dtype).eps / 2 * 1.01 * rounded
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_all_formulations_agree(scheme: str) -> None:
    """A sequence's numbers do not jump when it moves from a bucket of few rows to one of many."""
    layer, stored = make(scheme, 64, bias=True, dtype=torch.float32)
    x = torch.randn((64, 64), generator=torch.Generator().manual_seed(2))
    whole = call(layer, stored, x)
    for rows in (1, 2, 3, 8, 9, 32, 33):
        # float32 sums of 64 numbers in another order.
        torch.testing.assert_close(call(layer, stored, x[:rows]), whole[:rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_product_is_close_to_the_one_that_was_quantized(scheme: str) -> None:
    """The end of the chain: layer(x) against x @ dequantized weight, through this project's own dequantize."""
    layer, stored = make(scheme, 37, bias=False, dtype=torch.float32)
    x = torch.randn((4, 37), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        call(layer, stored, x), x @ find_scheme(scheme).dequantize(stored, torch.float32).T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_the_layer_declares_what_the_checkpoint_holds_and_no_memory(scheme: str) -> None:
    layer, _ = make(scheme, 37, bias=True, dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert [name for name, _ in layer.named_parameters()] == [
        {"fp8": "weight", "int8": "weight_packed"}[scheme],
        "weight_scale",
        "bias",
    ]
    assert layer.weight_scale.dtype == torch.bfloat16


class FromCompressedTensors(NamedTuple):
    """A linear layer that compressed-tensors has quantized: what it stores, and what it computes."""

    stored: dict[str, Tensor]
    forward: Callable[[Tensor], Tensor]
    """x -> the layer's output."""


def by_compressed_tensors(form: str, weight: Tensor) -> FromCompressedTensors:
    """By that library's own code, from the weight to the product."""
    scheme = library_scheme(form)
    module = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype))
    module[0].weight.data = weight.clone()
    config = QuantizationConfig(config_groups={"group_0": scheme}, quantization_status="frozen")
    apply_quantization_config(module, config, show_progress=False)
    low, high = (weight.amin(), weight.amax()) if "tensor" in form else weight.aminmax(dim=1, keepdim=True)
    module[0].weight_scale.data, _ = calculate_qparams(low, high, scheme.weights)
    compress_module(module[0])
    stored = {key: value.detach().clone() for key, value in module[0].state_dict().items()}
    decompress_module(module[0])
    return FromCompressedTensors(stored, module)


@pytest.mark.parametrize("rows", [1, 2, 20, 50])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_what_compressed_tensors_computes(form: str, dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    reference = by_compressed_tensors(form, torch.randn((10, 48), generator=generator).to(dtype))
    x = torch.randn((1, rows, 48), generator=generator).to(dtype)
    x[0, 0, 0] = -9  # the largest of its token: -127.5 steps of int8
    x[0, rows // 2, :] = 0 if rows > 2 else 1
    with torch.device("meta"):
        layer = QuantizedLinear(nn.Linear(48, 10, bias=False, dtype=dtype), find_scheme(form))
    found, expected = call(layer, reference.stored, x), reference.forward(x)
    # From the same input every number falls to the same step: what differs is the order in which sums are rounded, and
    # in bfloat16 that theirs multiplies weight and scale first, and rounds that. One number on another step would be
    # 1/127 of the largest of its token, times a weight.
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float16], ids=str)
@pytest.mark.parametrize(("form", "numbers"), [("fp8-dynamic", "float"), ("int8-dynamic", "int")])
def test_a_token_is_rounded_as_compressed_tensors_rounds_it_to_the_last_bit(
    form: str, numbers: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(4)
    sizes = 10 ** torch.linspace(-3, 3, 100).reshape(1, 100, 1)
    x = (torch.randn((1, 100, 16), generator=generator) * sizes).to(dtype)
    x[0, 50] = 0
    with torch.device("meta"):
        layer = QuantizedLinear(nn.Linear(16, 16, dtype=dtype), find_scheme(form))
    args = QuantizationArgs(num_bits=8, type=numbers, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, nn.Module())
    assert layer._rounded(x).equal(fake_quantize(x, scale, zero, args))
