from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_models.tiny import MODELS, save_random_model

from furiosa_build.build.build import Build
from furiosa_build.steps import quantize, shard
from furiosa_build.steps.base import Inputs

from .requests import job

StartBuild = Callable[..., Build]

ONE = "stage-0-rank-0-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: save_random_model(MODELS[name], root / name))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    directory = tmp_path / "output"
    directory.mkdir()
    return directory


def test_where_no_link_can_be_made_the_checkpoint_is_copied(
    saved: Callable[[str], Path], start_build: StartBuild, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as from a store that cannot be written and is on another file system."""
    build = start_build(saved("llama"), scheme="int8")
    partition = job(build, "partition:weights")
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EXDEV, "Invalid cross-device link")))
    digests = partition.run(output)
    assert digests == {ONE: hashlib.sha256((output / ONE).read_bytes()).hexdigest()}
    [stored] = (path for name, path in partition.inputs.files.items() if name.endswith(".safetensors"))
    assert (output / ONE).read_bytes() == stored.read_bytes()
    assert not (output / ONE).samefile(stored)


@pytest.mark.parametrize("name", ["llama", "tied", "qwen2", "gemma3"])
def test_unquantized_parameters_are_those_of_the_source(
    name: str, saved: Callable[[str], Path], start_build: StartBuild, output: Path
) -> None:
    digests = job(start_build(saved(name)), "partition:weights").run(output)
    assert [path.name for path in output.iterdir()] == [ONE]
    assert digests == {ONE: hashlib.sha256((output / ONE).read_bytes()).hexdigest()}
    found, expected = load_file(output / ONE), load_file(saved(name) / "model.safetensors")
    assert set(found) == set(expected)
    for tensor_name, tensor in found.items():
        assert tensor.equal(expected[tensor_name])


def test_parameters_take_the_dtype_of_the_model_and_no_more_than_the_model_has(
    saved: Callable[[str], Path], start_build: StartBuild, output: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    source = load_file(saved("llama") / "model.safetensors")
    save_file({**source, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}, model / "model.safetensors")
    config = json.loads((saved("llama") / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    job(start_build(model), "partition:weights").run(output)
    found = load_file(output / ONE)
    assert set(found) == set(source)
    for name, tensor in found.items():
        assert tensor.equal(source[name].to(torch.bfloat16))


def test_large_parameters_are_spread_over_files(
    saved: Callable[[str], Path], start_build: StartBuild, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "LARGEST_FILE", 60_000)
    digests = job(start_build(saved("llama")), "partition:weights").run(output)
    assert len(digests) > 3
    assert sorted(digests) == [
        f"stage-0-rank-0-{i + 1:05d}-of-{len(digests):05d}.safetensors" for i in range(len(digests))
    ]
    found: dict[str, torch.Tensor] = {}
    for name, sha256 in digests.items():
        assert sha256 == hashlib.sha256((output / name).read_bytes()).hexdigest()
        assert (output / name).stat().st_size < 60_000 + 2000
        found.update(load_file(output / name))
    assert set(found) == set(load_file(saved("llama") / "model.safetensors"))


def test_random_weights_are_the_same_whatever_the_files(
    start_build: StartBuild, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = job(start_build(MODELS["llama"], seed=3), "partition:weights")
    draw.run(output)
    monkeypatch.setattr(shard, "LARGEST_FILE", 60_000)
    several = tmp_path / "several"
    several.mkdir()
    draw.run(several)
    whole = load_file(output / ONE)
    for file in several.iterdir():
        for name, tensor in load_file(file).items():
            assert tensor.equal(whole.pop(name))
    assert whole == {}


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_quantized_checkpoint_is_linked_and_not_copied(
    scheme: str,
    saved: Callable[[str], Path],
    start_build: StartBuild,
    output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantize, "LARGEST_FILE", 50_000)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    quantize_it = job(start_build(saved("qwen2"), scheme=scheme), "quantize")
    made = quantize_it.run(checkpoint)
    assert len(made) > 2
    files = Inputs({name: checkpoint / name for name in made}, tmp_path)
    request = shard.ShardRequest(**{**dict(quantize_it.request), "inputs": made})
    digests = shard.Shard().run(request, files, output)
    assert sorted(digests) == [f"stage-0-rank-0-{i + 1:05d}-of-{len(made):05d}.safetensors" for i in range(len(made))]
    for (name, sha256), (original, expected) in zip(sorted(digests.items()), sorted(made.items()), strict=True):
        assert sha256 == expected
        assert (output / name).samefile(checkpoint / original)
