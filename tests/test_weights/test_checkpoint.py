from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from furiosa_build.core.errors import UserError
from furiosa_build.ir.outline import ParameterOutline
from furiosa_build.ir.tensors import Layout
from furiosa_build.weights.checkpoint import check_parameters
from furiosa_build.weights.directory import ModelDirectory
from furiosa_build.weights.random import RandomSource
from furiosa_build.weights.safetensors import SafetensorsSource


def parameter(*shape: int, dtype: str = "float32") -> ParameterOutline:
    return ParameterOutline(dtype=dtype, shape=list(shape), linear=False)


PARAMETERS = {
    "model.embed_tokens.weight": parameter(300, 64),
    "model.layers.0.up_proj.weight": parameter(50, 400),
    "model.layers.0.up_proj.bias": parameter(500),
    "model.norm.weight": parameter(500),
}


# Random weights


def test_a_tensor_depends_on_seed_name_and_shape_alone() -> None:
    source = RandomSource(PARAMETERS, seed=1)
    forwards = {name: source.read(name) for name in PARAMETERS}
    backwards = {name: source.read(name) for name in reversed(PARAMETERS)}
    alone = {name: RandomSource({name: outline}, seed=1).read(name) for name, outline in PARAMETERS.items()}
    for name, tensor in forwards.items():
        assert tensor.equal(backwards[name])
        assert tensor.equal(alone[name])

    name = "model.layers.0.up_proj.weight"
    assert not RandomSource(PARAMETERS, seed=2).read(name).equal(forwards[name])
    assert not RandomSource({"other": PARAMETERS[name]}, seed=1).read("other").equal(forwards[name])
    reshaped = RandomSource({name: parameter(400, 50)}, seed=1).read(name)
    assert not reshaped.flatten().equal(forwards[name].flatten() * (400 / 50) ** 0.5)


def test_the_numbers_are_the_same_on_every_machine_and_day() -> None:
    """Artifacts of random weights are compared across machines: a change here is a change of every such artifact."""
    tensor = RandomSource({"w": parameter(2, 2)}, seed=0).read("w")
    expected = torch.tensor([[-1.07442915, -0.41486984], [-1.26973891, 0.86224771]])
    torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-8)


def test_drawing_in_parts_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.embed_tokens.weight"
    whole = RandomSource(PARAMETERS, seed=3).read(name)
    monkeypatch.setattr("furiosa_build.weights.random._DRAW", 1000)
    assert RandomSource(PARAMETERS, seed=3).read(name).equal(whole)


def test_a_lower_dtype_is_the_rounded_one() -> None:
    wide = RandomSource({"w": parameter(30, 40)}, seed=4).read("w")
    narrow = RandomSource({"w": parameter(30, 40, dtype="bfloat16")}, seed=4).read("w")
    assert narrow.dtype == torch.bfloat16
    assert narrow.equal(wide.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("name", "mean", "deviation"),
    [
        ("model.embed_tokens.weight", 0.0, 64**-0.5),
        ("model.layers.0.up_proj.weight", 0.0, 400**-0.5),
        ("model.layers.0.up_proj.bias", 0.0, 0.02),
        ("model.norm.weight", 1.0, 0.02),
    ],
)
def test_activations_keep_their_size(name: str, mean: float, deviation: float) -> None:
    tensor = RandomSource(PARAMETERS, seed=5).read(name)
    # At least 500 draws: their mean is within 5 and their deviation within 6 standard errors.
    assert abs(float(tensor.mean()) - mean) < 5 * deviation / 500**0.5
    assert abs(float(tensor.std()) / deviation - 1) < 6 / 1000**0.5


# Files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, path)
    return path


def test_tensors_of_files_are_mapped(file: Path) -> None:
    save_file({"c": torch.zeros(1)}, file.with_name("more.safetensors"))
    source = SafetensorsSource([file, file.with_name("more.safetensors")])
    assert source.names() == {"a", "b", "c"}
    assert source.read("a").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert source.read("b").dtype == torch.bfloat16
    assert source.layout("a") == Layout("float32", (2, 3))
    assert RandomSource(PARAMETERS, 0).layout("model.norm.weight") == Layout("float32", (500,))


def test_a_tensor_in_two_files_is_refused(file: Path) -> None:
    other = file.with_name("other.safetensors")
    save_file({"b": torch.zeros(1)}, other)
    with pytest.raises(UserError, match="tensor b stands in two files") as error:
        SafetensorsSource([file, other])
    assert error.value.where == str(other)


def test_a_file_that_is_cut_short_is_refused_wherever_it_is_cut(file: Path) -> None:
    content = file.read_bytes()
    for length in (0, 4, 8, 20, len(content) - 30, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"model\.safetensors is not a sound safetensors file") as error:
            SafetensorsSource([file])
        assert error.value.where == str(file)
        assert "cut short" in str(error.value.hint)


def header(**changes: object) -> bytes:
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


@pytest.mark.parametrize(
    "content",
    [
        (2**62).to_bytes(8, "little") + b"{}",
        header(data_offsets=[0, 2**40]),
        header(shape=[2]),
        header(dtype="X9"),
        b"PK\x03\x04 and so on, a torch checkpoint",
    ],
    ids=["length", "offsets", "shape", "dtype", "zip"],
)
def test_a_file_that_lies_about_itself_is_refused(file: Path, content: bytes) -> None:
    SafetensorsSource([file])
    file.write_bytes(content)
    with pytest.raises(UserError, match="not a sound safetensors file"):
        SafetensorsSource([file])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a sound safetensors file"):
        SafetensorsSource([tmp_path / "absent.safetensors"])


def test_a_path_that_is_no_text_is_not_called_a_damaged_file(file: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.raises(UserError, match=r"is not UTF-8: byte 0xe9 at offset \d+\n"):
        SafetensorsSource([file.rename(odd)])


# Directories


def sharded(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_directory_has_one_file_or_an_index(file: Path) -> None:
    assert set(ModelDirectory(file.parent).weight_files()) == {"model.safetensors"}
    save_file({"c": torch.zeros(1)}, file.with_name("second.safetensors"))
    sharded(file.parent, {"a": "first.safetensors", "b": "first.safetensors", "c": "second.safetensors"})
    assert set(ModelDirectory(file.parent).weight_files()) == {"model.safetensors"}, "as transformers"
    file.rename(file.with_name("first.safetensors"))
    index = "model.safetensors.index.json"
    assert set(ModelDirectory(file.parent).weight_files()) == {"first.safetensors", "second.safetensors", index}


def test_config_json_may_name_the_weights(file: Path) -> None:
    save_file({"c": torch.zeros(1)}, file.with_name("second.safetensors"))
    config = file.with_name("config.json")
    config.write_text(json.dumps({"transformers_weights": "second.safetensors"}))
    assert set(ModelDirectory(file.parent).weight_files()) == {"second.safetensors"}
    for named in ("../second.safetensors", "absent.safetensors", "pytorch_model.bin"):
        config.write_text(json.dumps({"transformers_weights": named}))
        with pytest.raises(UserError, match=r"config\.json names its weights"):
            ModelDirectory(file.parent).weight_files()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": "absent.safetensors"}, "absent.safetensors is missing"),
        ({"a": "../model.safetensors"}, "outside its directory"),
        ({"a": "/etc/passwd"}, "outside its directory"),
        ({"a": ".."}, "missing|outside"),
    ],
    ids=["absent", "relative", "absolute", "parent"],
)
def test_an_index_names_files_beside_it(file: Path, index: dict[str, str], message: str) -> None:
    directory = file.parent / "model"
    directory.mkdir()
    sharded(directory, index)
    with pytest.raises(UserError, match=message):
        ModelDirectory(directory).weight_files()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_of_another_form_is_refused(file: Path, text: str) -> None:
    file.unlink()
    (file.parent / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        ModelDirectory(file.parent).weight_files()


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no weights") as error:
        ModelDirectory(tmp_path).weight_files()
    assert "model.safetensors" in str(error.value.valid)
    (tmp_path / "model.fp16.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"no weights of the names that transformers loads, but model\.fp16\.safet"):
        ModelDirectory(tmp_path).weight_files()


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"pickles \(pytorch_model\.bin\), which are never loaded") as error:
        ModelDirectory(tmp_path).weight_files()
    assert "save_pretrained" in error.value.hint


# Do weights and architecture belong together?


class Given:
    """A source of given tensors."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> set[str]:
        return set(self.tensors)

    def layout(self, name: str) -> Layout:
        return Layout.of(self.tensors[name])

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


def test_weights_that_fit_are_taken_and_more_than_is_asked_for_does_not_matter() -> None:
    tensors = {"a": torch.zeros((2, 3)), "more": torch.zeros(1)}
    check_parameters(Given(tensors), {"a": parameter(2, 3, dtype="bfloat16")}, "here")


def test_missing_parameters_are_counted_and_named() -> None:
    wanted = {name: parameter(1) for name in "abcdef"}
    with pytest.raises(UserError) as error:
        check_parameters(Given({"b": torch.zeros(1)}), wanted, "/models/here")
    assert error.value.what == "the weights lack 5 of 6 parameters: a, c, d, ..."
    assert error.value.where == "/models/here"
    assert "config.json" in str(error.value.hint)
    with pytest.raises(UserError, match="lack 1 of 6 parameters: f"):
        check_parameters(Given({name: torch.zeros(1) for name in "abcde"}), wanted, "")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_weights_that_are_quantized_already_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=f"parameter a has dtype {str(dtype).removeprefix('torch.')}") as error:
        check_parameters(Given({"a": torch.zeros((2, 3)).to(dtype)}), {"a": parameter(2, 3)}, "/models/here")
    assert error.value.where == "/models/here"


def test_a_parameter_of_another_shape_is_named() -> None:
    with pytest.raises(UserError) as error:
        check_parameters(Given({"a": torch.zeros((3, 2))}), {"a": parameter(2, 3)}, "/models/here")
    assert error.value.what == "parameter a has shape [3, 2], the architecture asks for [2, 3]"
    assert error.value.where == "/models/here"
