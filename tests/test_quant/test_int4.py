"""int4 weights: against compressed-tensors, which defines how they are stored, and against the least error there is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from test_models.tiny import LLAMA
from torch import Tensor

from furiosa_build.build.build import Build
from furiosa_build.core.errors import UserError
from furiosa_build.ir.sharding import Cut, Share
from furiosa_build.ir.tensors import Layout
from furiosa_build.quant import slices
from furiosa_build.quant.compressed_tensors import quantization_config
from furiosa_build.quant.scheme import scheme as find_scheme

from .layers import random_weight

SCHEMES = ["int4", "int4-32", "int4-64-asymmetric", "int4-32-asymmetric-dynamic"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def library_scheme(scheme: str) -> tuple[QuantizationScheme, type[BaseCompressor]]:
    """What compressed-tensors reads in the configuration that a checkpoint of `scheme` says."""
    config = QuantizationConfig.model_validate(quantization_config({"m": scheme}, ["lm_head"]))
    group = config.config_groups["group_0"]
    return group, BaseCompressor.get_value_from_registry(str(group.format or config.format))


def shifted(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of which some lie far from zero, one is zero, and one has a group of zeros."""
    weight = random_weight(rows, columns, torch.float32)
    weight[1] += 4
    weight[2] = weight[2].abs()
    weight[3] = 0
    weight[4, :128] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("text", SCHEMES)
def test_the_library_reads_what_is_stored_as_the_same_weight(text: str, dtype: torch.dtype) -> None:
    weight = shifted(16, 256, dtype)
    stored = find_scheme(text).quantize(weight)
    group, compressor = library_scheme(text)
    assert set(stored) == set(compressor.compression_param_names(group))
    found = compressor.decompress(dict(stored), group)["weight"]
    assert found.dtype == dtype
    assert find_scheme(text).dequantize(stored, dtype).equal(found)
    assert (found[3] == 0).all()
    assert (found[4, :128] == 0).all()


def test_one_group_has_zero_points_too() -> None:
    weight = shifted(16, 128)
    stored = find_scheme("int4-asymmetric").quantize(weight)
    group, compressor = library_scheme("int4-asymmetric")
    assert (
        find_scheme("int4-asymmetric")
        .dequantize(stored, torch.float32)
        .equal(compressor.decompress(dict(stored), group)["weight"])
    )


@pytest.mark.parametrize("text", SCHEMES)
def test_stored_bytes_are_those_the_library_writes(text: str) -> None:
    weight = shifted(16, 256)
    stored = find_scheme(text).quantize(weight)
    group, compressor = library_scheme(text)
    given = {"weight": weight, "weight_scale": stored["weight_scale"]}
    if not group.weights.symmetric:
        given["weight_zero_point"] = _zeros(stored)
    expected = compressor.compress(given, group)
    assert set(stored) == set(expected)
    for name, tensor in stored.items():
        assert tensor.equal(expected[name]), name


def _zeros(stored: dict[str, Tensor]) -> Tensor:
    """The zero points [out, groups]: eight rows are one int32, the first in its lowest bits."""
    words = stored["weight_zero_point"]
    return torch.stack([(words >> 4 * i) & 15 for i in range(8)], dim=1).flatten(0, 1).to(torch.int8) - 8


@pytest.mark.parametrize("text", ["int4-32", "int4", "int4-asymmetric"])
def test_no_scale_of_a_thousand_is_much_better(text: str) -> None:
    own = find_scheme(text)
    size = own.group_size  # type: ignore[attr-defined]
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    error = (own.dequantize(own.quantize(weight), torch.float32) - weight).square().sum()
    groups = weight.reshape(-1, size)
    if own.asymmetric:  # type: ignore[attr-defined]
        own_range = (groups.amax(1) - groups.amin(1)).unsqueeze(1) / 15
        step, zero = own_range, (-8 - groups.amin(1, keepdim=True) / own_range).round()
        plain = (((groups / step + zero).round().clamp(-8, 7) - zero) * step - groups).square().sum()
        assert error < 0.95 * plain
        return
    least = torch.full((len(groups),), torch.inf)
    for steps in torch.linspace(5, 14, 1000):
        step = groups.abs().amax(1, keepdim=True) / steps
        least = torch.minimum(least, ((groups / step).round().clamp(-8, 7) * step - groups).square().sum(1))
    assert error <= 1.04 * least.sum()


@pytest.mark.parametrize("text", SCHEMES)
def test_a_product_is_that_of_the_dequantized_weight(text: str) -> None:
    own, weight = find_scheme(text), shifted(16, 256)
    stored = own.quantize(weight)
    layouts = own.operands(Layout.of(weight))
    operands = [stored[name].view(getattr(torch, layout.dtype)) for name, layout in layouts.items()]
    assert [Layout.of(operand) for operand in operands] == list(layouts.values())
    x = torch.randn(3, 2, 256, dtype=torch.float64)
    expected = x @ own.dequantize(stored, torch.float64).T
    torch.testing.assert_close(own.product(x, operands), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", SCHEMES)
def test_parts_are_known_before_and_do_not_depend_on_other_rows(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own, weight = find_scheme(text), shifted(40, 256, torch.bfloat16)
    stored = own.quantize(weight)
    assert {name: Layout.of(part) for name, part in stored.items()} == own.parts(Layout.of(weight))
    monkeypatch.setattr(slices, "_ELEMENTS_AT_A_TIME", 256 * 7)
    for name, part in own.quantize(weight).items():
        assert part.equal(stored[name]), name
    assert own.dequantize(stored, torch.float32).equal(own.dequantize(own.quantize(weight), torch.float32))


@pytest.mark.parametrize("how", ["rows", "columns"])
@pytest.mark.parametrize("text", SCHEMES)
def test_shares_together_are_the_whole(text: str, how: str) -> None:
    own, weight = find_scheme(text), shifted(16, 256)
    stored, whole = own.quantize(weight), own.dequantize(own.quantize(weight), torch.float32)
    shares = []
    for rank in range(2):
        share = Share(Layout.of(weight), Cut(how=how), 2, rank)  # type: ignore[arg-type]
        parts = {
            name: own.derived(name, share.local) if name == "weight_shape" else own.shard(name, part, share)
            for name, part in stored.items()
        }
        assert {name: Layout.of(part) for name, part in parts.items()} == own.parts(share.local)  # type: ignore[arg-type]
        shares.append(own.dequantize({n: p.contiguous() for n, p in parts.items()}, torch.float32))  # type: ignore[union-attr]
    assert torch.cat(shares, dim=0 if how == "rows" else 1).equal(whole)


def test_what_does_not_fit_is_refused() -> None:
    assert find_scheme("int4").refusal(Layout("float32", (8, 192))) == "192 columns are not whole groups of 128"
    assert find_scheme("int4-64").refusal(Layout("float32", (7, 192))) == ""
    assert find_scheme("int4-64-asymmetric").refusal(Layout("float32", (12, 192))) == (
        "the zero points of 12 rows are not whole int32, of 8 each"
    )


BUCKETS = {"prefill_buckets": [[1, 32]], "decode_buckets": [[2, 64]], "max_seq_len_to_capture": 64}


def test_a_backend_without_it_is_refused_before_any_work(start_build: Callable[..., Build]) -> None:
    with pytest.raises(UserError) as error:
        start_build(LLAMA, scheme="int4", group_size=32, backend="inductor", **BUCKETS).plan  # noqa: B018
    assert error.value.what == "backend inductor does not compute with int4-32 weights"
    assert error.value.hint == "build with backend=native"


def test_ranks_that_would_cut_a_group_are_refused_before_any_work(start_build: Callable[..., Build]) -> None:
    ranks = {"tensor_parallel_size": 2}
    with pytest.raises(UserError) as error:
        start_build(LLAMA, scheme="int4", group_size=64, parallel=ranks, **BUCKETS).plan  # noqa: B018
    assert "cannot be quantized to int4-64" in error.value.what
    assert error.value.what.endswith("columns are not whole groups of 64")


def test_one_scheme_has_one_text() -> None:
    for text in ("int4", *SCHEMES):
        assert find_scheme(text).text == text
    assert find_scheme("int4-128-dynamic") == find_scheme("int4-dynamic")
