from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from furiosa_build.ir.tensors import Layout
from furiosa_build.weights.safetensors_writer import SafetensorsWriter, file_names, split_into_files

TENSORS: dict[str, Tensor] = {
    "odd": torch.arange(7, dtype=torch.int64),
    "bfloat16": torch.randn((4, 8)).to(torch.bfloat16),
    "float32": torch.randn((16, 4)),
    "float16": torch.randn(3).to(torch.float16),
    "float8": torch.randn((8, 8)).to(torch.float8_e4m3fn),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "words": torch.arange(32, dtype=torch.int32).reshape(4, 8),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty((0, 3)),
    "not contiguous": torch.randn((6, 32)).T,
}


def layout(tensor: Tensor) -> Layout:
    return Layout.of(tensor)


def write(path: Path, tensors: dict[str, Tensor]) -> SafetensorsWriter:
    with SafetensorsWriter(path, {name: layout(tensor) for name, tensor in tensors.items()}) as writer:
        for name in writer.order:
            writer.write(name, tensors[name])
    return writer


def offsets(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """Where the data begins, and begin and end of every tensor in the file."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    assert header.pop("__metadata__") == {"format": "pt"}
    return begin, {name: tuple(begin + o for o in entry["data_offsets"]) for name, entry in header.items()}


def test_the_safetensors_library_reads_back_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write(path, TENSORS)
    found = load_file(path)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert ours.equal(theirs), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    writer = write(path, TENSORS)
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_bytes_do_not_depend_on_the_order_of_the_layouts(tmp_path: Path) -> None:
    one = write(tmp_path / "one", TENSORS)
    other = write(tmp_path / "other", dict(reversed(TENSORS.items())))
    assert one.sha256 == other.sha256


@given(st.dictionaries(st.text("abc.", min_size=1), st.integers(0, 40), min_size=1, max_size=8))
def test_data_is_aligned_and_without_gaps(tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, int]) -> None:
    path = tmp_path_factory.mktemp("aligned") / "model.safetensors"
    # Sizes of 0, 16, ..., 624 bytes, some of them multiples of 64.
    write(path, {name: torch.zeros(4 * size) for name, size in sizes.items()})
    begin, places = offsets(path)
    assert begin % 64 == 0
    end = begin
    for name, (start, stop) in sorted(places.items(), key=lambda item: item[1]):
        assert start == end
        assert stop - start == 16 * sizes[name]
        if 16 * sizes[name] % 64 == 0:
            assert start % 64 == 0, "a tensor of whole lines does not begin on one"
        end = stop
    assert end == path.stat().st_size


@pytest.fixture
def two() -> dict[str, Tensor]:
    return {"a": torch.zeros((2, 3)), "b": torch.zeros(4)}


def test_tensors_out_of_order_are_refused(tmp_path: Path, two: dict[str, Tensor]) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {name: layout(tensor) for name, tensor in two.items()})
    second = writer.order[1]
    with pytest.raises(ValueError, match="not the next"), writer:
        writer.write(second, two[second])


@pytest.mark.parametrize(
    "wrong", [torch.zeros((3, 2)), torch.zeros(6), torch.zeros((2, 3), dtype=torch.bfloat16)], ids=str
)
def test_a_tensor_of_another_shape_or_dtype_is_refused(tmp_path: Path, two: dict[str, Tensor], wrong: Tensor) -> None:
    with (
        pytest.raises(ValueError, match="laid out as"),
        SafetensorsWriter(tmp_path / "x", {"a": layout(two["a"])}) as w,
    ):
        w.write("a", wrong)


def test_a_tensor_written_twice_is_refused(tmp_path: Path, two: dict[str, Tensor]) -> None:
    with SafetensorsWriter(tmp_path / "x", {"a": layout(two["a"])}) as writer:
        writer.write("a", two["a"])
        with pytest.raises(ValueError, match="not the next"):
            writer.write("a", two["a"])


def test_missing_tensors_are_refused_at_the_end(tmp_path: Path, two: dict[str, Tensor]) -> None:
    layouts = {name: layout(tensor) for name, tensor in two.items()}
    with pytest.raises(ValueError, match="1 tensors were not written"), SafetensorsWriter(tmp_path / "x", layouts) as w:
        w.write(w.order[0], two[w.order[0]])
    assert w.sha256 == ""


def test_an_error_inside_is_not_hidden_by_the_missing_tensors(tmp_path: Path, two: dict[str, Tensor]) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {"a": layout(two["a"])})
    with pytest.raises(KeyError, match="inside"), writer:
        raise KeyError("inside")
    assert writer.sha256 == ""


def test_tensors_are_spread_in_order_and_groups_stay_together() -> None:
    def of(nbytes: int) -> Layout:
        return Layout("uint8", (nbytes,))

    groups = [{"a": of(4)}, {"b": of(4)}, {"c": of(3), "d": of(3)}, {"e": of(30)}, {"f": of(1)}]
    assert [list(file) for file in split_into_files(groups, 10)] == [["a", "b"], ["c", "d"], ["e"], ["f"]]
    assert [list(file) for file in split_into_files(groups, 100)] == [["a", "b", "c", "d", "e", "f"]]
    assert split_into_files([], 10) == []


def test_files_are_named_as_hugging_face_names_them() -> None:
    assert file_names(1) == ["model.safetensors"]
    assert file_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
