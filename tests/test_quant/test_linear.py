"""Layers with quantized weights, as traces see them: against compressed-tensors, and against float64."""

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

from furiosa_build.backends.cpu_quantized_linear import lower_quantized_linear
from furiosa_build.quant.int8 import packed_columns
from furiosa_build.quant.linear import QuantizedEmbedding, QuantizedLinear, operands_of
from furiosa_build.quant.ops import quantized_linear_reference
from furiosa_build.quant.scheme import scheme as find_scheme

from .layers import operands, random_weight, sums_of_products

FLOATS = [torch.float32, torch.bfloat16]
WAYS = {"reference": quantized_linear_reference, "inductor": lower_quantized_linear}


def test_packed_rows_are_whole_words() -> None:
    assert [packed_columns(n) for n in (1, 4, 5, 8)] == [4, 4, 8, 8]


def quantized(original: nn.Linear, scheme: str) -> QuantizedLinear:
    return QuantizedLinear(original, operands_of(original.weight, find_scheme(scheme)))


def make(scheme: str, columns: int, *, bias: bool, dtype: torch.dtype) -> tuple[QuantizedLinear, dict[str, Tensor]]:
    """A layer with 10 outputs, and its parameters as a program sees them."""
    with torch.device("meta"):
        layer = quantized(nn.Linear(columns, 10, bias=bias, dtype=dtype), scheme)
    stored = find_scheme(scheme).quantize(random_weight(10, columns, dtype))
    names = [name for name, _ in layer.named_parameters() if name != "bias"]
    parameters = dict(zip(names, operands(scheme, stored, columns), strict=True))
    if bias:
        parameters["bias"] = torch.randn(10, generator=torch.Generator().manual_seed(columns)).to(dtype)
    for name, parameter in layer.named_parameters():
        assert (parameters[name].dtype, parameters[name].shape) == (parameter.dtype, parameter.shape)
    return layer, parameters


@pytest.mark.parametrize("leading", [(), (1,), (3, 3), (2, 20)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("columns", "bias"), [(32, False), (37, True)], ids=["32", "37-bias"])
@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_product_is_that_of_the_dequantized_weight(
    scheme: str, columns: int, bias: bool, dtype: torch.dtype, leading: tuple[int, ...]
) -> None:
    layer, parameters = make(scheme, columns, bias=bias, dtype=dtype)
    x = torch.randn((*leading, columns), generator=torch.Generator().manual_seed(1)).to(dtype)
    found = torch.func.functional_call(layer, parameters, (x,))
    stored = find_scheme(scheme).quantize(random_weight(10, columns, dtype))
    product, added_up = sums_of_products(scheme, stored, x)
    expected = product + (parameters["bias"].double() if bias else 0)
    assert found.dtype == dtype
    assert found.shape == (*leading, 10)
    # The sum is in float32 or better, whatever the order: so many units of 2**-24 of what is added up. Then up to three
    # roundings to dtype follow, of the product, of the product with the scale, and of the sum with the bias.
    rounded = product.abs() * 2 + expected.abs()
    allowed = columns * 2.0**-24 * added_up + torch.finfo(dtype).eps / 2 * 1.01 * rounded
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_the_layer_declares_what_the_checkpoint_holds_and_no_memory(scheme: str) -> None:
    with torch.device("meta"):
        layer = quantized(nn.Linear(37, 10, dtype=torch.bfloat16), scheme)
    assert all(parameter.is_meta for parameter in layer.parameters())
    weight = {"fp8": "weight", "int8": "weight_packed"}[scheme]
    assert [name for name, _ in layer.named_parameters()] == [weight, "weight_scale", "bias"]
    assert layer.weight_scale.dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", ["int8", "fp8-dynamic"])
def test_a_trace_has_one_operator_for_the_product(scheme: str) -> None:
    with torch.device("meta"):
        layer = quantized(nn.Linear(32, 10), scheme)
        program = torch.export.export(layer, (torch.empty(4, 32),))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert [str(node.target) for node in calls] == ["furiosa.quantized_linear.default", "aten.add.Tensor"]
    assert calls[0].args[3] == scheme
    assert calls[0].meta["val"].shape == (4, 10)


def test_the_operator_is_registered_as_torch_wants_it() -> None:
    weight = operands("int8", find_scheme("int8").quantize(random_weight(10, 32)), 32)
    for largest in (None, torch.ones(4, 1)):
        arguments = (torch.randn(4, 32), weight, largest, "int8-dynamic")
        torch.library.opcheck(
            torch.ops.furiosa.quantized_linear.default,
            arguments,
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [1, 2, 20, 50])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_computes_what_compressed_tensors_computes(
    form: str, dtype: torch.dtype, rows: int, way: str
) -> None:
    generator = torch.Generator().manual_seed(rows)
    reference = by_compressed_tensors(form, torch.randn((10, 48), generator=generator).to(dtype))
    x = torch.randn((1, rows, 48), generator=generator).to(dtype)
    x[0, 0, 0] = -9  # the largest of its token: -127.5 steps of int8
    x[0, rows // 2, :] = 0 if rows > 2 else 1
    found = WAYS[way](x, operands(form, reference.stored, 48), None, form)
    expected = reference.forward(x)
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
    args = QuantizationArgs(num_bits=8, type=numbers, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, nn.Module())
    found = find_scheme(form).round(x, x.abs().amax(-1, keepdim=True))
    assert found.equal(fake_quantize(x, scale, zero, args))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [32, 37])
def test_rows_of_an_embedding_are_those_of_the_dequantized_weight(columns: int, dtype: torch.dtype) -> None:
    own, weight = find_scheme("int8"), random_weight(20, columns, dtype)
    stored = own.quantize(weight)
    layer = QuantizedEmbedding(nn.Embedding.from_pretrained(weight), operands_of(weight, own))
    parameters = dict(zip(dict(layer.named_parameters()), operands("int8", stored, columns), strict=True))
    ids = torch.tensor([[3, 19, 0], [3, 3, 7]])
    found = torch.func.functional_call(layer, parameters, (ids,))
    assert torch.equal(found, own.dequantize(stored, dtype)[ids])
