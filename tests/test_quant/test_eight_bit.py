from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from furiosa_build.ir.tensors import Layout
from furiosa_build.quant import slices
from furiosa_build.quant.compressed_tensors import quantization_config
from furiosa_build.quant.scheme import scheme as find_scheme

from .layers import random_weight

QUANTIZED = ["fp8", "int8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized(weight: Tensor, scheme: str) -> dict[str, Tensor]:
    """The parts of a weight."""
    return find_scheme(scheme).quantize(weight)


def dequantize(stored: dict[str, Tensor], scheme: str) -> Tensor:
    """The weight that parts stand for, in the dtype of its scales."""
    return find_scheme(scheme).dequantize(stored, stored["weight_scale"].dtype)


def library_scheme(scheme: str) -> tuple[QuantizationScheme, type[BaseCompressor]]:
    """What compressed-tensors reads in the configuration that a checkpoint of `scheme` says."""
    config = QuantizationConfig.model_validate(quantization_config({"m": scheme}, ["lm_head"]))
    group = config.config_groups["group_0"]
    return group, BaseCompressor.get_value_from_registry(str(group.format or config.format))


# Against the compressed-tensors library, which is where such checkpoints are defined.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 37])
def test_fp8_scales_are_the_library_s(columns: int, dtype: torch.dtype) -> None:
    weight = random_weight(9, columns, dtype)
    group, _ = library_scheme("fp8")
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    expected, _ = calculate_qparams(low, high, group.weights)
    found = quantized(weight, "fp8")["weight_scale"]
    assert found.dtype == dtype
    assert found.equal(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_scales_reach_the_largest_weight_exactly(dtype: torch.dtype) -> None:
    """The library divides by 127.5 and clamps what rounds to 128; here the largest weight is 127, without clamping."""
    weight = random_weight(9, 37, dtype)
    scale = quantized(weight, "int8")["weight_scale"]
    assert scale.equal((weight.float().abs().amax(1, keepdim=True) / 127).to(dtype))
    group, _ = library_scheme("int8")
    expected, _ = calculate_qparams(*torch.aminmax(weight.float(), dim=1, keepdim=True), group.weights)
    torch.testing.assert_close(scale.float(), expected * (127.5 / 127), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 37])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_stored_bytes_are_those_the_library_writes(scheme: str, columns: int, dtype: torch.dtype) -> None:
    """Given the same scales, and arithmetic in float32."""
    weight = random_weight(9, columns, dtype)
    found = quantized(weight, scheme)
    group, compressor = library_scheme(scheme)
    expected = compressor.compress({"weight": weight.float(), "weight_scale": found["weight_scale"].float()}, group)
    assert set(found) == set(expected)
    for name in set(found) - {"weight_scale"}:
        assert found[name].dtype == expected[name].dtype, name
        assert found[name].shape == expected[name].shape, name
        if name == "weight_shape":
            assert found[name].equal(expected[name])
        else:
            # Rows of int8 are padded to whole words; what is in the padding nobody reads.
            ours, theirs = (tensor[name].view(torch.uint8)[:, :columns] for tensor in (found, expected))
            assert ours.equal(theirs), name


@pytest.mark.parametrize("columns", [64, 37])
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_the_library_reads_back_what_dequantize_says(scheme: str, columns: int) -> None:
    found = quantized(random_weight(9, columns), scheme)
    group, compressor = library_scheme(scheme)
    expected = compressor.decompress(dict(found), group)["weight"]
    assert dequantize(found, scheme).equal(expected)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_the_library_takes_the_configuration_for_weights_only(scheme: str) -> None:
    group, _ = library_scheme(scheme)
    assert group.targets == ["Linear"]
    assert group.input_activations is None
    assert group.weights.symmetric
    assert group.weights.strategy == "channel"
    assert group.weights.pytorch_dtype() == (torch.float8_e4m3fn if scheme == "fp8" else torch.int8)


# Against the definition.


def half_a_step(weight: Tensor, scale: Tensor, scheme: str) -> Tensor:
    """The largest error that rounding to nearest may make, in float64."""
    units = weight.double().abs() / scale.double()
    if scheme == "int8":
        return torch.full_like(units, 0.5) * scale.double()
    # float8_e4m3fn: 3 bits after the point; the smallest exponent is -6, below it steps are all 2**-9.
    exponent = torch.floor(torch.log2(units.clamp_min(2.0**-6))).clamp(max=8)
    return 0.5 * 2.0 ** (exponent - 3) * scale.double()


# Up to 2**100, so that scales stay well within bfloat16, and down to subnormal numbers.
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    columns = draw(st.integers(1, 9))
    rows = draw(st.lists(st.lists(FLOATS, min_size=columns, max_size=columns), min_size=1, max_size=4))
    return torch.tensor(rows, dtype=torch.float32).to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@given(weights(), st.sampled_from(QUANTIZED))
def test_no_weight_moves_by_more_than_half_a_step(weight: Tensor, scheme: str) -> None:
    stored = quantized(weight, scheme)
    scale = stored["weight_scale"]
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert not stored["weight"].float().isnan().any() if scheme == "fp8" else True
    found = dequantize(stored, scheme)
    assert found.dtype == weight.dtype
    # dequantize rounds once more, to the dtype; the division by the scale is rounded to float32. A scale rounded down
    # clamps the largest weight, which is then off by at most the scale's own rounding.
    eps = torch.finfo(weight.dtype).eps
    slack = weight.double().abs() * (eps + 2.0**-23) + scale.double() * 2.0**-20
    limit = 448 if scheme == "fp8" else 127
    clamped = (weight.double().abs() / scale.double() - limit).clamp(min=0) * scale.double()
    assert (clamped <= weight.double().abs() * eps).all()
    error = (found.double() - weight.double()).abs()
    assert (error <= half_a_step(weight, scale, scheme) + slack).all()


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_row_of_zeros_stays_one(scheme: str) -> None:
    weight = random_weight(3, 8)
    weight[1] = 0
    stored = quantized(weight, scheme)
    assert stored["weight_scale"][1].isfinite()
    assert stored["weight_scale"][1] > 0
    assert (dequantize(stored, scheme)[1] == 0).all()


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_row_is_quantized_alike_whatever_the_other_rows_are(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(40, 12)
    whole = quantized(weight, scheme)
    monkeypatch.setattr(slices, "_ELEMENTS_AT_A_TIME", 12 * 7)
    for name, tensor in quantized(weight, scheme).items():
        assert tensor.equal(whole[name]), name
    alone = quantized(weight[17:18].clone(), scheme)
    assert dequantize(alone, scheme).equal(dequantize(whole, scheme)[17:18])


def test_ties_go_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, -0.5, -1.5, 2.5]])
    assert dequantize(quantized(weight, "int8"), "int8").tolist() == [[127.0, 0.0, 2.0, -0.0, -2.0, 2.0]]


def test_no_quantization_leaves_the_weight_alone() -> None:
    weight = random_weight(2, 3)
    assert find_scheme("none").quantize(weight) == {"weight": weight}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [64, 37, 1])
@pytest.mark.parametrize("scheme", ["none", *QUANTIZED])
def test_layouts_are_known_before_quantizing(scheme: str, columns: int, dtype: torch.dtype) -> None:
    weight = random_weight(5, columns, dtype)
    found = {part: Layout.of(tensor) for part, tensor in find_scheme(scheme).quantize(weight).items()}
    assert found == find_scheme(scheme).parts(Layout.of(weight))
    assert sum(layout.nbytes for layout in found.values()) == find_scheme(scheme).nbytes(Layout.of(weight))


def test_parts_are_named_as_a_compressed_tensors_checkpoint_names_them() -> None:
    weight = Layout("bfloat16", (5, 6))

    def names(scheme: str, parameter: str = "a.b.weight") -> list[str]:
        return sorted(find_scheme(scheme).layouts(parameter, weight))

    assert names("fp8") == names("int8-plain-tensor") == ["a.b.weight", "a.b.weight_scale"]
    assert names("int8") == ["a.b.weight_packed", "a.b.weight_scale", "a.b.weight_shape"]
    assert names("none", "a.b.bias") == ["a.b.bias"]


def test_forms_that_only_checkpoints_have_are_not_made() -> None:
    with pytest.raises(ValueError, match="int8-plain weights are taken from checkpoints"):
        find_scheme("int8-plain").quantize(random_weight(2, 3))
