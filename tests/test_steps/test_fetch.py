"""fetch: `model.param_file_path`, weights apart from the model's directory. Hostile files: test_hostile_input."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from user_directory import (
    UserDirectory,
    furiosa_build,
    make_built_directory,
    make_user_directory,
    steps_in_this_process,
)

from furiosa_build.core.errors import UserError
from furiosa_build.weights import hub

UP = "model.layers.0.mlp.up_proj.weight"
GIVEN = "model.param_file_path=weights/tuned.safetensors"


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """The recipe has been built from the model's directory. Not to be changed."""
    return make_built_directory(tmp_path_factory.mktemp("fetch"))


@pytest.fixture
def user(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """The model's directory has no weights: they are in a file elsewhere, under another name. Nothing is built."""
    user = make_user_directory(tmp_path / "user", tmp_path / "store", built.root / "tiny")
    (user.root / "weights").mkdir()
    (user.root / "tiny" / "model.safetensors").rename(weights(user))
    return user


def weights(user: UserDirectory) -> Path:
    return user.root / "weights" / "tuned.safetensors"


def change(file: Path) -> None:
    """Other numbers of the same shapes."""
    tensors = load_file(file)
    save_file({**tensors, UP: tensors[UP] * 1.5}, file, metadata={"format": "pt"})


def test_the_same_weights_make_the_same_artifact(user: UserDirectory, built: UserDirectory) -> None:
    user.build(GIVEN)
    assert user.latest().metadata.artifact_id == built.latest().metadata.artifact_id
    assert user.build(GIVEN) == []
    elsewhere = user.root.parent / "elsewhere.safetensors"
    weights(user).rename(elsewhere)
    assert user.build(f"model.param_file_path={elsewhere}") == [], "where the file lies, and its name, are nothing"


def test_the_weights_of_the_directory_are_not_looked_at(user: UserDirectory, built: UserDirectory) -> None:
    shutil.copy(weights(user), user.root / "tiny" / "model.safetensors")
    change(user.root / "tiny" / "model.safetensors")
    user.build(GIVEN)
    assert user.latest().model_metadata.weights_digest == built.latest().model_metadata.weights_digest
    (user.root / "tiny" / "model.safetensors").write_bytes(b"no weights at all")
    assert user.build(GIVEN) == []


def test_another_file_rebuilds_what_other_weights_rebuild(user: UserDirectory) -> None:
    user.build(GIVEN)
    before = user.latest()
    change(weights(user))
    assert user.build(GIVEN) == ["fetch", "quantize", "partition:weights", "package", "qualify"]
    assert user.latest().model_metadata.weights_digest != before.model_metadata.weights_digest
    [file] = (user.artifacts / "latest" / "params").iterdir()
    assert torch.equal(load_file(file)[UP], load_file(weights(user))[UP])


def test_quantized_and_divided(user: UserDirectory) -> None:
    """Every step that reads weights takes them from the file; qualify compares with it."""
    user.build(GIVEN, "quantization=int8", "parallel.tensor_parallel_size=2")
    assert user.latest().model_metadata.quantization == "int8"


def test_a_file_that_changes_during_a_build_is_refused(user: UserDirectory) -> None:
    with closing(user.open(GIVEN, "quantization=int8")) as build:
        build.run("fetch")
        change(weights(user))
        with pytest.raises(UserError, match=r"tuned.safetensors has changed since it was fetched"):
            build.run("quantize")


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps({UP: [1.0]}))


def lacking(file: Path) -> None:
    tensors = load_file(file)
    del tensors[UP]
    save_file(tensors, file)


def ill_shaped(file: Path) -> None:
    tensors = load_file(file)
    save_file({**tensors, UP: tensors[UP].T.contiguous()}, file)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut_short, "tuned.safetensors is not a sound safetensors file"),
        (pickled, "tuned.safetensors is not a sound safetensors file"),
        (lacking, f"the weights lack 1 of 21 parameters: {UP}"),
        (ill_shaped, f"parameter {UP} has shape [32, 48], the architecture asks for [48, 32]"),
        (Path.unlink, "parameter file 'weights/tuned.safetensors' does not exist"),
    ],
)
def test_a_file_that_is_not_the_weights_is_refused(
    user: UserDirectory, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(weights(user))
    ran = furiosa_build(user, "build", "tiny", GIVEN)
    assert ran.status == 2
    assert words in ran.err
    assert str(weights(user)) in ran.err or "model.param_file_path" in ran.err


def test_a_seed_contradicts_it(user: UserDirectory) -> None:
    ran = furiosa_build(user, "plan", "tiny", GIVEN, "model.seed_for_random_weight=3")
    assert ran.status == 2
    assert "seed_for_random_weight=3: weights are either read or random" in ran.err
    assert "valid: one of the two" in ran.err


def test_the_plan_counts_the_file_and_no_download(user: UserDirectory) -> None:
    with closing(user.open(GIVEN)) as build:
        figures = build.preflight()
    size = weights(user).stat().st_size
    assert size < figures.work["fetch"].read < size + 10_000, "the file, and the config"
    assert figures.work["fetch"].written == 0


def test_of_a_hub_model_no_weights_are_downloaded(
    user: UserDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = []
    commit = tmp_path / ("c" * 40)
    shutil.copytree(user.root / "tiny", commit)

    def download(request: dict[str, Any]) -> dict[str, str]:
        asked.append(request["patterns"])
        return {"directory": str(commit)}

    monkeypatch.setattr(hub, "_in_process", download)
    with closing(user.open(GIVEN, "model.model_id_or_path=org/model")) as build:
        build.run("fetch")
    assert not any("safetensors" in pattern for patterns in asked for pattern in patterns)
    assert [patterns for patterns in asked if "tokenizer.json" in patterns] != []
