"""Packed weights: where each number lies, and that unpacking gives every bit back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from furiosa_build.backends.native.packing import NativePacker, pack, packed_layout, unpack
from furiosa_build.ir.tensors import Layout

DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int8", "uint8", "int32")


def _drawn(dtype: str, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Any bits at all."""
    number = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(0, 256, (rows, columns * number.itemsize), dtype=torch.uint8, generator=generator)
    return stored.view(number)


@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 100),
    columns=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_unpacking_gives_every_bit_back(dtype: str, rows: int, columns: int, seed: int) -> None:
    tensor = _drawn(dtype, rows, columns, seed)
    layout = Layout.of(tensor)
    packed = pack(tensor)
    assert Layout.of(packed) == packed_layout(layout) == NativePacker().layout("none", "weight", layout)
    assert packed.is_contiguous()
    assert unpack(packed, layout).view(torch.uint8).equal(tensor.view(torch.uint8))


def test_a_large_matrix_is_packed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = _drawn("bfloat16", 300, 64)
    whole = pack(tensor)
    monkeypatch.setattr("furiosa_build.backends.native.packing._UNITS_AT_A_TIME", 2 * 32 * 32)
    assert pack(tensor).view(torch.int16).equal(whole.view(torch.int16))
    assert unpack(whole, Layout.of(tensor)).view(torch.int16).equal(tensor.view(torch.int16))


def test_where_the_numbers_of_a_unit_lie() -> None:
    tensor = torch.arange(40 * 6).reshape(40, 6).to(torch.float16)
    packed = pack(tensor)
    assert packed.shape == (2, 3, 32, 2)
    assert packed[0, 1, 5].tolist() == tensor[5, 2:4].tolist()
    assert packed[1, 2, 7].tolist() == tensor[39, 4:6].tolist()
    assert not packed[1, :, 8:].any()
    assert pack(tensor.float()).shape == (2, 6, 32)


@pytest.mark.parametrize("columns", [8, 10])
def test_both_forms_of_int8_are_packed_alike(columns: int) -> None:
    numbers = _drawn("int8", 40, columns)
    offset = torch.full((40, -(-columns // 4) * 4), 128, dtype=torch.uint8)
    offset[:, :columns] = numbers.to(torch.int16).add(128).to(torch.uint8)
    assert pack(numbers).equal(pack(offset))
    assert pack(numbers).equal(pack(offset.view(torch.int32)))
    assert (pack(numbers)[1, :, 8:] == 128).all()  # rows of padding are zero


def test_what_is_not_a_matrix_stays_as_it_is() -> None:
    for layout in (
        Layout("bfloat16", (64, 1)),
        Layout("bfloat16", (1,)),
        Layout("float32", (64,)),
        Layout("bfloat16", (4, 64, 64)),
        Layout("int64", (2,)),
    ):
        assert packed_layout(layout) == layout
    scale = torch.rand(64, 1)
    assert pack(scale) is scale


def test_a_slice_of_a_larger_matrix_is_packed() -> None:
    whole = _drawn("float8_e4m3fn", 70, 33)
    part = whole[3:61, 5:20]
    assert unpack(pack(part), Layout.of(part)).view(torch.uint8).equal(part.contiguous().view(torch.uint8))
