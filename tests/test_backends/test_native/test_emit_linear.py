"""Products of one x with weights of every scheme, as plans that the library runs, against the schemes themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from furiosa_build.backends.graph import Graph, export_module
from furiosa_build.backends.native.emit import make_plan
from furiosa_build.backends.native.packing import pack
from furiosa_build.backends.native.program import NativeProgram
from furiosa_build.ir.tensors import Layout, TensorSpec
from furiosa_build.quant.ops import quantized_linear
from furiosa_build.quant.scheme import scheme as find_scheme

from .graphs import run_on_torch

N, K = 70, 131
FORMS = ["int8", "int8-plain", "int8-tensor", "fp8", "fp8-tensor"]
SCHEMES = [form + rounding for form in FORMS for rounding in ("", "-dynamic")]


class Weight(NamedTuple):
    """The operands of a scheme as graphs see them, and as they lie in memory."""

    scheme: str
    operands: list[Tensor]
    stored: list[Tensor]


class Products(torch.nn.Module):
    def __init__(self, schemes: Sequence[str], is_share: bool) -> None:
        super().__init__()
        self._schemes, self._is_share = schemes, is_share

    def forward(self, *values: Tensor) -> list[Tensor]:
        x, largest, *operands = values
        own = largest if self._is_share else None
        pairs = zip(self._schemes, operands[::2], operands[1::2], strict=True)
        return [quantized_linear(x, [weight, scale], own, scheme) for scheme, weight, scale in pairs]


@pytest.mark.parametrize("is_share", [False, True])
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_scheme(library_file: Path, dtype: torch.dtype, rows: int, is_share: bool) -> None:
    torch.manual_seed(0)
    weights = [_weight(scheme, dtype) for scheme in SCHEMES]
    x = torch.randn(rows, 2, K).to(dtype)
    largest = x.abs().amax(-1, keepdim=True) * (1.5 if is_share else 1)
    operands = [operand for weight in weights for operand in weight.operands]
    inputs = [x, largest, *operands]
    roles = ["activation", "activation", *["parameter"] * len(operands)]
    specs = [
        TensorSpec(name=f"t{i}", role=role, dtype=str(t.dtype).removeprefix("torch."), shape=list(t.shape))  # type: ignore[arg-type]
        for i, (t, role) in enumerate(zip(inputs, roles, strict=True))
    ]
    program, _ = export_module(Products(SCHEMES, is_share), specs)
    graph = Graph.from_exported(program, specs, SCHEMES, keeps_inputs=True)
    plan = make_plan(graph)
    assert [call.op for call in plan.calls if call.op in ("linear", "round_rows")].count("round_rows") == 2
    given = [x, largest, *(tensor for weight in weights for tensor in weight.stored)]
    for out, weight in zip(run_on_torch(NativeProgram(plan, library_file, 1), given), weights, strict=True):
        own = find_scheme(weight.scheme)
        numbers, scale = weight.operands
        rounded = own.round(x, largest) if own.rounds_activations else x
        exact = own.product(rounded.double(), [numbers, scale.double()])
        size = own.product(rounded.double().abs(), [_magnitudes(numbers), scale.double()])
        # A rounded number times its scale is rounded to the dtype of x by the scheme, and not by the library.
        allowed = torch.finfo(dtype).eps * (exact.abs() + (size if own.rounds_activations else 0)) + 2**-19 * size
        assert ((out.double() - exact).abs() <= allowed).all(), weight.scheme


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_groups(library_file: Path, dtype: torch.dtype, rows: int) -> None:
    """Of one group and of several, with zero points and without, beside a weight without groups."""
    texts = ["int4", "int4-32", "int4-64-asymmetric", "int4-asymmetric-dynamic", "int8-dynamic"]
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 128).to(dtype), torch.randn(72, 128).to(dtype)
    layouts, stored = [], []
    for text in texts:
        own = find_scheme(text)
        parts = own.quantize(weight)
        for name, layout in own.operands(Layout.of(weight)).items():
            layouts.append(layout)
            stored.append(parts[name])
    types = [("x", "activation", Layout.of(x)), *((f"p{n}", "parameter", own) for n, own in enumerate(layouts))]
    specs = [TensorSpec(name=n, role=role, dtype=t.dtype, shape=list(t.shape)) for n, role, t in types]  # type: ignore[arg-type]
    counts = [len(find_scheme(text).operands(Layout.of(weight))) for text in texts]

    class All(torch.nn.Module):
        def forward(self, *values: Tensor) -> list[Tensor]:
            x, *operands = values
            given = iter(operands)
            return [
                quantized_linear(x, [next(given) for _ in range(count)], None, text)
                for text, count in zip(texts, counts, strict=True)
            ]

    program, _ = export_module(All(), specs)
    plan = make_plan(Graph.from_exported(program, specs, texts, keeps_inputs=True))
    assert sorted(call.op for call in plan.calls) == ["linear", "linear_groups", "linear_groups", "round_rows"]
    outs = run_on_torch(NativeProgram(plan, library_file, 1), [x, *map(pack, stored)])
    for text, out in zip(texts, outs, strict=True):
        own = find_scheme(text)
        exact = own.dequantize({name: _wide(part) for name, part in own.quantize(weight).items()}, torch.float64)
        rounded = own.round(x, x.abs().amax(-1, keepdim=True)) if own.rounds_activations else x
        wanted, size = (
            rounded.double() @ exact.T,
            rounded.double().abs() @ (exact.abs() + 16 * exact.abs().amax() / 7).T,
        )
        allowed = torch.finfo(dtype).eps * (wanted.abs() + (size if own.rounds_activations else 0)) + 2**-19 * size
        assert ((out.double() - wanted).abs() <= allowed).all(), text


def _wide(part: Tensor) -> Tensor:
    return part.double() if part.is_floating_point() else part


def _weight(text: str, dtype: torch.dtype) -> Weight:
    scale = (torch.rand(1 if "tensor" in text else N, 1) + 0.5).to(dtype)
    scale = scale.reshape(1) if "tensor" in text else scale
    if text.startswith("fp8"):
        numbers = (torch.randn(N, K) * 50).to(torch.float8_e4m3fn)
        return Weight(text, [numbers, scale], [pack(numbers), scale])
    numbers = torch.randint(-128, 128, (N, K)).to(torch.int8)
    if "plain" in text:
        return Weight(text, [numbers, scale], [pack(numbers), scale])
    packed = torch.full((N, -(-K // 4) * 4), 128, dtype=torch.uint8)
    packed[:, :K] = (numbers.to(torch.int16) + 128).to(torch.uint8)
    return Weight(text, [packed, scale], [pack(packed.view(torch.int32)), scale])


def _magnitudes(numbers: Tensor) -> Tensor:
    """The weight with its numbers' magnitudes, in the form of the scheme."""
    if numbers.dtype == torch.uint8:
        return ((numbers.to(torch.int16) - 128).abs() + 128).clamp(max=255).to(torch.uint8)
    if numbers.dtype == torch.int8:
        return numbers.to(torch.int16).abs().clamp(max=127).to(torch.int8)
    return numbers.float().abs().to(torch.float8_e4m3fn)
