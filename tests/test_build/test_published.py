"""What a build publishes: the artifact, healed where it is damaged, and `latest` once it qualifies."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import user_directory
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from user_directory import UserDirectory, steps_in_this_process

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.artifact.schema import Artifact, to_json
from furiosa_build.core.errors import StepError
from furiosa_build.runtime.probe import Questions

TRACES = [
    f"partition:{bucket}:{kind}" for bucket in ("prefill-1x32", "decode-2x64") for kind in ("first", "block", "last")
]
ARTIFACT = ["package", "qualify"]
WEIGHTS = ["quantize", "partition:weights"]


@pytest.fixture(autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


def files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def change_weights(directory: Path) -> None:
    """Other numbers of the same shapes."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name] * 1.5}, file, metadata={"format": "pt"})


def test_a_deleted_artifact_is_published_again_without_work(user: UserDirectory) -> None:
    before = to_json(user.latest())
    shutil.rmtree(user.root / "artifacts")
    assert user.build() == []
    assert to_json(user.latest()) == before


def test_the_figures_of_qualification_are_replaced_whole(user: UserDirectory) -> None:
    """Who reads them meanwhile sees the old ones or the new ones."""
    [file] = user.artifacts.glob("*.qualify.json")
    figures = file.read_bytes()
    file.write_text("old")
    opened = file.open()
    (user.artifacts / "latest").unlink()
    assert user.build() == []
    assert file.read_bytes() == figures
    with opened:
        assert opened.read() == "old"


def test_a_deleted_link_is_made_again_without_work(user: UserDirectory) -> None:
    (user.artifacts / "latest").unlink()
    assert user.build() == []
    assert user.latest()


MAKES = {
    "artifact.json": {"package"},
    "provenance.json": {"package"},
    "manifest.json": set(),
    "timestamp.json": set(),
    "model/config.json": {"quantize", "package"},
    "params/stage-0-rank-0-00001-of-00001.safetensors": {"partition:weights"},
    "programs/decode-2x64.block.json": {"partition:decode-2x64:block", "compile:decode-2x64:block"},
}
"""The steps that have the file among their outputs."""


@pytest.mark.parametrize("file", MAKES)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_artifact_is_healed(user: UserDirectory, file: str, damage: str) -> None:
    """A truncated file truncates the store's blob as well, for they are one; that is a miss, and it is made again."""
    before = to_json(user.latest())
    path = user.artifacts / "latest" / file
    if damage == "missing":
        path.unlink()
    else:
        path.chmod(0o644)
        os.truncate(path, path.stat().st_size - 1)
    ran = user.build()
    assert to_json(user.latest()) == before
    assert set(ran) <= {"truncated": MAKES[file], "missing": set()}[damage]


def test_an_artifact_json_that_says_something_else_is_replaced(user: UserDirectory) -> None:
    path = user.artifacts / "latest" / "artifact.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "devices": "gpu"}))
    assert user.build() == ["package"], "it is a link into the store"
    assert user.latest().devices == "cpu"


def test_a_file_too_many_is_removed(user: UserDirectory) -> None:
    (user.artifacts / "latest" / "programs" / "extra.so").write_text("what is this?")
    assert user.build() == []
    assert user.latest()


def test_no_second_copy_of_what_the_store_holds(user: UserDirectory) -> None:
    user.build("quantization=int8")
    blobs = {path.stat().st_ino for path in (user.store / "blobs").rglob("*")}
    directory = (user.artifacts / "latest").resolve()
    own = {name for name in files(directory) if (directory / name).stat().st_ino not in blobs}
    assert own == {"manifest.json", "timestamp.json"}


def test_another_file_system_gets_copies(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def only_within_the_store(source: Path, target: Path, **others: Any) -> None:
        if user.root in Path(target).parents:
            raise OSError(18, "Invalid cross-device link")
        link(source, target, **others)

    before = to_json(user.latest())
    monkeypatch.setattr(os, "link", only_within_the_store)
    shutil.rmtree(user.root / "artifacts")
    assert user.build() == []
    assert to_json(user.latest()) == before


def test_another_save_dir_gets_the_same_artifact(user: UserDirectory, tmp_path: Path) -> None:
    assert user.build(f"save_dir='{tmp_path}/a b/ö'") == []
    there = open_artifact(tmp_path / "a b" / "ö" / "tiny" / "latest", verify="full")
    assert to_json(there.artifact) == to_json(user.latest())


def test_another_place_gives_the_same_bytes_and_keys(new: UserDirectory, built_store: Path) -> None:
    """Another directory, another store, another process's memory: only the time differs."""
    new.build()
    first = built_store.parent / "user" / "artifacts" / "tiny" / "latest"
    second = new.artifacts / "latest"
    assert first.readlink() == second.readlink()
    assert files(first) == files(second)
    different = [file for file in files(first) if (first / file).read_bytes() != (second / file).read_bytes()]
    assert set(different) <= {"timestamp.json"}
    assert to_json(read_artifact(first)) == to_json(read_artifact(second))
    factors = [
        {path.read_bytes() for path in store.glob("actions/*/*/key_factors.json")} for store in (built_store, new.store)
    ]
    assert factors[0] == factors[1]
    assert not [text for text in factors[0] if str(Path.home()).encode() in text or b"/tmp" in text]


def read_artifact(directory: Path) -> Artifact:
    return Artifact.model_validate_json((directory / "artifact.json").read_bytes())


# Qualification


def test_latest_moves_only_after_qualify(user: UserDirectory) -> None:
    old = (user.artifacts / "latest").readlink()
    build = user.open("scheduler.max_processing_samples=1")
    for name in build.plan.steps:
        if name != "qualify":
            build.run(name)
    assert (build.version_directory / "manifest.json").is_file()
    assert (user.artifacts / "latest").readlink() == old
    build.run("qualify")
    assert (user.artifacts / "latest").readlink() == Path(build.version_directory.name) != old


def test_an_artifact_that_says_something_else_is_not_accepted(
    user: UserDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = (user.artifacts / "latest").readlink()
    answer = user_directory.answer_in_this_process

    def answer_noise(artifact: Path, questions: Questions, work: Path) -> Path:
        file = answer(artifact, questions, work)
        with safe_open(file, "pt") as opened:
            told = opened.metadata()
        tensors = load_file(file)
        tensors |= {n: t + torch.arange(t.shape[-1]) for n, t in tensors.items() if n.startswith("logits")}
        save_file(tensors, file, told)
        return file

    with monkeypatch.context() as patch:
        patch.setattr(user_directory, "answer_in_this_process", answer_noise)
        with pytest.raises(StepError, match=r"step qualify failed: .*the artifact's logits are not the model's"):
            user.build("scheduler.max_processing_samples=1")
    assert (user.artifacts / "latest").readlink() == old
    assert user.build("scheduler.max_processing_samples=1") == ["qualify"], "the failure was not kept"
    assert (user.artifacts / "latest").readlink() != old


def test_going_back_runs_nothing_and_moves_latest_back(user: UserDirectory) -> None:
    old = (user.artifacts / "latest").readlink()
    user.build("scheduler.max_processing_samples=1")
    assert (user.artifacts / "latest").readlink() != old
    assert user.build() == []
    assert (user.artifacts / "latest").readlink() == old
