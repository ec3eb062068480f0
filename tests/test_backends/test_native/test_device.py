"""The native device's tensors, beside torch's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from furiosa_build.backends.native.device import NativeDevice
from furiosa_build.backends.torch_device import TorchDevice
from furiosa_build.ir.tensors import Layout, TensorSpec

OWN, OF_TORCH = NativeDevice(), TorchDevice()


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    )


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4))
def test_sums_are_those_of_torch_whatever_the_bits(seed: int, count: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**16, (count, 7, 200), dtype=np.uint16)
    parts = list(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16))
    found = OWN.to_torch(OWN.sum([OWN.from_torch(part) for part in parts]))
    expected = OF_TORCH.sum([part.clone() for part in parts])
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0.5), expected.nan_to_num(0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_summed_and_put_side_by_side(dtype: torch.dtype) -> None:
    parts = [torch.randn(3, 1, 5, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3)]
    own = [OWN.from_torch(part) for part in parts]
    assert same(OWN.to_torch(OWN.sum(own)), OF_TORCH.sum(parts))
    assert same(OWN.to_torch(OWN.concatenate(own)), OF_TORCH.concatenate(parts))
    assert np.array_equal(OWN.to_numpy(own[0]), OF_TORCH.to_numpy(parts[0]))


def test_parameters_are_mapped(tmp_path: Path) -> None:
    file = tmp_path / "p.safetensors"
    stored = {
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "fp8": torch.randn(4, 2).to(torch.float8_e4m3fn),
        "integers": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
    }
    save_file(stored, file)
    found = OWN.map_parameters([file])
    assert found.keys() == stored.keys()
    assert all(same(OWN.to_torch(found[name]), stored[name]) for name in stored)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    begin, end = (int(address, 16) for address in lines[0][0].split("-"))
    assert all(begin <= tensor.address < end for tensor in found.values() if tensor.nbytes)
    found["integers"].array[0, 0] = 9  # a private mapping: the file stays as it is
    assert int(OF_TORCH.map_parameters([file])["integers"][0, 0]) == 0


def test_a_parameter_is_reinterpreted_or_refused() -> None:
    spec = TensorSpec(name="w", role="parameter", dtype="float32", shape=[3])
    bits = torch.tensor([1.0, -2.0, 0.5])
    assert OWN.to_torch(OWN.parameter(OWN.from_torch(bits.view(torch.int32)), spec)).tolist() == bits.tolist()
    for stored in (torch.zeros(4), torch.zeros(3, dtype=torch.uint8), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match=r"it is not a float32 \[3\]"):
            OWN.parameter(OWN.from_torch(stored), spec)


def test_memory() -> None:
    assert OWN.allocate_kv_cache(Layout("bfloat16", (17, 2, 4))).layout.shape == (32, 2, 4)
    allocated = OWN.allocate(Layout("bfloat16", (4, 3)))
    assert (allocated.address % 64, allocated.nbytes, allocated.array.any()) == (0, 24, False)
    array = np.arange(4).reshape(2, 2)
    assert OWN.from_numpy(array).address == array.ctypes.data
    for size in (2**50, 2**62):
        with pytest.raises(MemoryError):
            OWN.allocate(Layout("float32", (size,)))
