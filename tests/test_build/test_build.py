"""Builds of a tiny model from one end to the other: what runs again when what has changed, and what is published."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file, save_file
from user_directory import CONFIG, RANDOM, UserDirectory, run, steps_in_this_process

import furiosa_build.artifact.writer
import furiosa_build.backends.registry
import furiosa_build.core.file_digests
import furiosa_build.core.files
from furiosa_build.backends.eager import EagerBackend
from furiosa_build.core.errors import StepError, UserError
from furiosa_build.plan import keys
from furiosa_build.plan.source_code import SourceCode
from furiosa_build.store import Store
from furiosa_build.ui.artifact_text import artifact_text, result_text
from furiosa_build.ui.plan_text import plan_text

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


# The first build and the second


def test_the_first_build_runs_every_step(new: UserDirectory) -> None:
    build = new.open()
    assert run(build) == list(build.plan.steps)
    artifact = new.latest()
    assert artifact.metadata.name == "tiny"
    version = artifact.metadata.artifact_id[:12]
    assert sorted(path.name for path in new.artifacts.iterdir()) == [version, f"{version}.qualify.json", "latest"]
    assert (new.artifacts / "latest").readlink() == Path(version)
    assert files(new.artifacts / version) == [
        "artifact.json",
        "manifest.json",
        "model/config.json",
        "model/generation_config.json",
        "params/stage-0-rank-0-00001-of-00001.safetensors",
        *sorted(f"programs/{bucket}.{kind}.json" for _, bucket, kind in (name.split(":") for name in TRACES)),
        "provenance.json",
        "timestamp.json",
    ]


def test_the_second_build_runs_nothing(new: UserDirectory) -> None:
    new.build()
    before = {file: (new.artifacts / file).stat().st_mtime_ns for file in files(new.artifacts)}
    again = new.open()
    assert [name for name in again.plan.steps if not again.is_done(name)] == []
    assert run(again) == []
    assert {file: (new.artifacts / file).stat().st_mtime_ns for file in files(new.artifacts)} == before


def test_a_step_cannot_run_before_those_that_it_needs(new: UserDirectory) -> None:
    with pytest.raises(StepError, match="step package failed: a step that it needs has not run"):
        new.open().run("package")


# What changes, and what runs


def programs(bucket: str, *kinds: str) -> list[str]:
    return [f"{step}:{bucket}:{kind}" for kind in kinds for step in ("partition", "compile")]


OVERRIDES = {
    "name=other": ARTIFACT,
    "scheduler.max_processing_samples=7": ARTIFACT,
    "save_dir=elsewhere": [],
    "num_compile_workers=2": [],
    "buckets.decode_buckets=[[2,64],[3,64]]": [*programs("decode-3x64", "first", "block", "last"), *ARTIFACT],
    "quantization=int8": [*WEIGHTS, *programs("prefill-1x32", "block"), *programs("decode-2x64", "block"), *ARTIFACT],
}


@pytest.mark.parametrize(("override", "expected"), OVERRIDES.items(), ids=OVERRIDES)
def test_what_an_override_runs(user: UserDirectory, override: str, expected: list[str]) -> None:
    assert user.build(override) == expected
    assert user.build(override) == []


def test_changed_weights_of_the_same_shapes_compile_nothing(user: UserDirectory) -> None:
    before = user.latest()
    change_weights(user.root / "tiny")
    assert user.build() == ["fetch", *WEIGHTS, *ARTIFACT]
    assert user.latest().metadata.artifact_id != before.metadata.artifact_id
    assert user.latest().model_metadata.weights_digest != before.model_metadata.weights_digest


def test_weights_that_change_during_a_build_are_refused(user: UserDirectory) -> None:
    with closing(user.open("quantization=int8")) as build:
        build.run("fetch")
        change_weights(user.root / "tiny")
        with pytest.raises(UserError, match=r"model.safetensors has changed since it was fetched"):
            build.run("quantize")


def test_a_touched_file_runs_nothing(user: UserDirectory) -> None:
    os.utime(user.root / "tiny" / "model.safetensors", ns=(1, 1))
    assert user.build() == []


def test_a_comment_and_the_order_of_keys_run_nothing(user: UserDirectory) -> None:
    recipe = user.root / "recipes" / "tiny.yaml"
    defaults, model, buckets = (
        recipe.read_text().replace("model:", "|model:").replace("buckets:\n", "|buckets:\n").split("|")
    )
    recipe.write_text(f"{defaults}# A comment.\n{buckets}{model}")
    assert user.build() == []


def test_a_model_that_has_moved_runs_nothing(user: UserDirectory) -> None:
    (user.root / "elsewhere").mkdir()
    (user.root / "tiny").rename(user.root / "elsewhere" / "tiny")
    assert user.build(f"model.model_id_or_path='{user.root}/elsewhere/tiny'") == []


def test_a_model_of_another_name_is_packaged_again(user: UserDirectory) -> None:
    (user.root / "tiny").rename(user.root / "other")
    assert user.build("model.model_id_or_path=other") == ARTIFACT
    assert user.latest().model_metadata.pretrained_id == "other"


def test_equal_output_stops_the_rebuild(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit of the tracer that changes no graph traces again, and compiles nothing."""
    digests = SourceCode.digests

    def edited(self: SourceCode, modules: Iterable[str]) -> dict[str, str]:
        return {
            **digests(self, modules),
            **({"furiosa_build.steps.trace": "edited"} if "furiosa_build.steps.trace" in modules else {}),
        }

    monkeypatch.setattr(SourceCode, "digests", edited)
    assert user.build() == TRACES


def test_a_backend_that_has_been_edited_compiles_again_and_qualifies(
    user: UserDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What loads a program is the backend's code as well as what makes it."""
    digests = SourceCode.digests

    def edited(self: SourceCode, modules: Iterable[str]) -> dict[str, str]:
        return {
            **digests(self, modules),
            **({"furiosa_build.backends.eager": "edited"} if "furiosa_build.backends.eager" in modules else {}),
        }

    monkeypatch.setattr(SourceCode, "digests", edited)
    assert user.build() == [name.replace("partition", "compile") for name in TRACES] + ["qualify"]


def test_a_new_torch_runs_the_steps_that_it_shapes(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither fetch, nor compile: the eager backend's program is the graph whatever the version."""
    monkeypatch.setattr(keys, "version", lambda package: "9.9" if package == "torch" else version(package))
    assert sorted(user.build()) == sorted([*WEIGHTS, *TRACES, *ARTIFACT])


def test_two_recipes_share_their_steps(user: UserDirectory) -> None:
    recipe = (user.root / "recipes" / "tiny.yaml").read_text()
    (user.root / "recipes" / "twin.yaml").write_text(recipe)
    assert user.build(recipe="twin") == ARTIFACT


# Failures


def test_a_step_that_fails_is_not_recorded_and_what_is_finished_stays(
    new: UserDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("furiosa_build.steps.shard.Shard.run", Mock(side_effect=ZeroDivisionError))
        with pytest.raises(StepError, match="step partition:weights failed: ZeroDivisionError") as caught:
            new.build()
    assert Path(caught.value.log).parent == new.store / "logs"
    assert not new.artifacts.exists()
    build = new.open()
    assert [name for name in build.plan.steps if build.is_done(name)] == ["fetch", "quantize"]
    assert run(build) == list(build.plan.steps)[2:]


@pytest.mark.parametrize(
    ("step", "module"),
    [("fetch", furiosa_build.core.file_digests), ("package", furiosa_build.core.files)],
    ids=["while files are read", "while files are copied"],
)
def test_an_interruption_ends_a_step_of_this_process_at_once(
    new: UserDirectory, monkeypatch: pytest.MonkeyPatch, step: str, module: ModuleType
) -> None:
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EXDEV, "Invalid cross-device link")))
    build = new.open()
    for name in list(build.plan.steps)[: list(build.plan.steps).index(step)]:
        build.run(name)
    check, pieces = module.check_cancelled, []

    def interrupt() -> None:
        pieces.append(step)
        build.interrupt()
        check()

    monkeypatch.setattr(module, "check_cancelled", interrupt)
    with pytest.raises(StepError, match=f"step {step} failed: the build was interrupted"):
        build.run(step)
    assert pieces == [step]
    build.close()
    assert [path.name for path in new.artifacts.glob("*") if path.name != "latest"] == []
    kept = {record.step for record, _, _ in Store(new.store).records()}
    assert (step in kept) == (step == "package"), "what is copied is in the store"


@pytest.mark.parametrize(
    "place",
    [(Store, "_commit"), (furiosa_build.artifact.writer, "link_or_copy")],
    ids=["the store's", "the artifact's"],
)
def test_a_disk_that_is_full_makes_a_step_fail(
    user: UserDirectory, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]
) -> None:
    monkeypatch.setattr(*place, Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(StepError, match=r"step package failed: OSError: .* No space left on device"):
        user.build("name=other")
    assert not (user.root / "artifacts" / "other").exists() or not list((user.root / "artifacts" / "other").iterdir())


# Where weights come from


def test_random_weights_say_so_everywhere(user: UserDirectory) -> None:
    note = "THE WEIGHTS ARE RANDOM, drawn from seed 0"
    build = user.open(*RANDOM)
    assert run(build)[0] == "fetch"
    assert user.latest().model_metadata.seed_for_random_weight == 0
    assert note in plan_text(build)
    assert note in result_text(build.version_directory)
    assert note in artifact_text(user.latest(), user.artifacts / "latest")


def test_weights_that_are_not_random_do_not(user: UserDirectory) -> None:
    build = user.open()
    run(build)
    shown = [
        plan_text(build),
        result_text(build.version_directory),
        artifact_text(user.latest(), user.artifacts / "latest"),
    ]
    assert not any("RANDOM" in text.upper() for text in shown)


def test_a_model_in_the_hubs_cache_needs_no_network(
    new: UserDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0123456789" * 4
    cached = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(new.root / "tiny", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for revision in ("null", commit):
        overrides = ("model.model_id_or_path=org/tiny", f"model.revision={revision}", "name=tiny")
        assert bool(new.build(*overrides)) == (revision == "null"), "a branch is the commit that it stands for"
        assert new.latest().model_metadata.pretrained_id == "org/tiny"
        assert new.latest().model_metadata.revision == commit


def test_an_architecture_that_is_not_that_of_the_weights_is_refused(user: UserDirectory) -> None:
    """Although the store has the listing of these weights."""
    fields = json.dumps({**CONFIG, "model_type": "mistral", "architectures": ["MistralForCausalLM"]})
    recipe = user.root / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("model:\n", f"model:\n  architecture: {fields}\n"))
    with pytest.raises(
        UserError, match=r"config\.json says model_type='llama', the recipe's architecture says 'mistral'"
    ):
        user.build()


# Backends of others


class MyBackend(EagerBackend):
    """A backend of another package, under an entry point."""

    name = "mine"

    def key_factors(self) -> Mapping[str, str]:
        return {"mine": "1.0"}


def test_a_backend_of_another_package_builds(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(group: str) -> Sequence[Any]:
        assert group == "furiosa_build.backends"
        return [SimpleNamespace(name="mine", load=lambda: MyBackend)]

    monkeypatch.setattr(furiosa_build.backends.registry, "entry_points", entry_points)
    compiles = [name.replace("partition", "compile") for name in TRACES]
    assert sorted(user.build("backend.name=mine")) == sorted([*compiles, *ARTIFACT])
    assert user.latest().backend == "mine"
