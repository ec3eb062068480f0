"""A new format of weight files is one file: this one, whose format the package does not know."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from user_directory import (
    CONFIG,
    UserDirectory,
    furiosa_build,
    make_built_directory,
    make_user_directory,
    steps_in_this_process,
)

from furiosa_build.ir.tensors import Layout
from furiosa_build.weights import formats
from furiosa_build.weights.format import WeightFormat

MAGIC = b"TOY\n"


class ToyFormat(WeightFormat):
    """A line of JSON with the model's config and the tensors' shapes, and then all numbers as float32."""

    name = "toy"

    def recognizes(self, file: Path) -> bool:
        with file.open("rb") as opened:
            return opened.read(len(MAGIC)) == MAGIC

    def check(self, file: Path) -> None:
        header, begin = read_header(file)
        numbers = sum(torch.Size(shape).numel() for shape in header["tensors"].values())
        if file.stat().st_size != begin + 4 * numbers:
            raise ValueError(f"it should have {begin + 4 * numbers} bytes")

    def open(self, files: Sequence[Path]) -> ToyTensors:
        [file] = files
        return ToyTensors(file)

    def config(self, file: Path) -> dict[str, Any] | None:
        config: dict[str, Any] | None = read_header(file)[0]["config"]
        return config


class ToyTensors:
    """The tensors of a file."""

    def __init__(self, file: Path) -> None:
        header, begin = read_header(file)
        numbers = torch.frombuffer(bytearray(file.read_bytes()[begin:]), dtype=torch.float32)
        sizes = [torch.Size(shape).numel() for shape in header["tensors"].values()]
        parts = zip(header["tensors"].items(), numbers.split(sizes), strict=True)
        self._tensors = {name: part.view(shape) for (name, shape), part in parts}

    def names(self) -> set[str]:
        return set(self._tensors)

    def layout(self, name: str) -> Layout:
        return Layout.of(self._tensors[name])

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers begin."""
    with file.open("rb") as opened:
        opened.seek(len(MAGIC))
        header: dict[str, Any] = json.loads(opened.readline())
        return header, opened.tell()


def write_toy(file: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None) -> None:
    header = {"config": config, "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()}}
    numbers = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors.values())
    file.write_bytes(MAGIC + json.dumps(header).encode() + b"\n" + numbers)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(formats, "FORMATS", [ToyFormat(), *formats.FORMATS])
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """The model from safetensors. Not to be changed."""
    return make_built_directory(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def user(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """The same model's weights in a toy file that describes it, and beside it in one that does not."""
    user = make_user_directory(tmp_path / "user", tmp_path / "store", built.root / "tiny")
    weights = user.root / "tiny" / "model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    config = json.loads((user.root / "tiny" / "config.json").read_text())
    write_toy(user.root / "whole.toy", tensors, config)
    write_toy(user.root / "weights.toy", tensors, None)
    return user


def parameters(user: UserDirectory) -> dict[str, torch.Tensor]:
    [file] = (user.artifacts / "latest" / "params").iterdir()
    return load_file(file)


def test_the_weights_of_a_model(user: UserDirectory, built: UserDirectory) -> None:
    """Built and qualified, which reads them once more."""
    user.build("model.param_file_path=weights.toy")
    found, expected = parameters(user), parameters(built)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert user.build("model.param_file_path=weights.toy") == []


@pytest.mark.grid
def test_a_model_by_its_one_file(user: UserDirectory, built: UserDirectory) -> None:
    user.build("model.model_id_or_path=whole.toy")
    assert user.latest().hf_config["hidden_size"] == CONFIG["hidden_size"]
    assert user.latest().model_metadata.pretrained_id == "whole.toy"
    assert all(parameters(user)[name].equal(tensor) for name, tensor in parameters(built).items())


@pytest.mark.grid
def test_quantized_and_divided(user: UserDirectory) -> None:
    user.build("model.param_file_path=weights.toy", "quantization=int8", "parallel.tensor_parallel_size=2")
    assert user.latest().model_metadata.quantization == "int8"


def test_what_its_format_says_of_a_file_is_told(user: UserDirectory) -> None:
    file = user.root / "weights.toy"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    ran = furiosa_build(user, "build", "tiny", "model.param_file_path=weights.toy")
    assert ran.status == 2
    assert f"weights.toy is not a sound toy file: it should have {size} bytes" in ran.err


def test_a_file_of_tensors_only_is_not_a_model(user: UserDirectory) -> None:
    ran = furiosa_build(user, "build", "tiny", "model.model_id_or_path=weights.toy")
    assert ran.status == 2
    assert "weights.toy does not describe its model: a toy file holds tensors only" in ran.err
    assert "model.param_file_path" in ran.err
