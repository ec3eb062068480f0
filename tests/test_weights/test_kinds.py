"""Which kind of source takes what a recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from furiosa_build.weights import hub
from furiosa_build.weights.directory import ModelDirectory
from furiosa_build.weights.hub import HubModel
from furiosa_build.weights.kinds import find_source
from furiosa_build.weights.model_source import ModelSource, Reference
from furiosa_build.weights.seed import RandomWeights
from furiosa_build.weights.single_file import WeightFile

COMMIT, OTHER = "c" * 40, "d" * 40


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "org" / "local").mkdir(parents=True)
    (tmp_path / "org" / "weights.safetensors").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("org/local", ModelDirectory),
        ("org/weights.safetensors", WeightFile),
        ("org/elsewhere", HubModel),
        ("gpt2", HubModel),
        ("./org/elsewhere", None),
        ("/org/local", None),
        ("org/a/b", None),
    ],
)
def test_what_is_on_this_machine_comes_before_the_hub(root: Path, name: str, kind: type[ModelSource] | None) -> None:
    assert type(find_source(Reference(name, (root,)))) is (kind or type(None))


def test_the_first_root_that_has_it_counts(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other" / "org" / "local").mkdir(parents=True)
    found = find_source(Reference("org/local", (tmp_path / "none", tmp_path / "other", root)))
    assert isinstance(found, ModelDirectory)
    assert found.path == tmp_path / "other" / "org" / "local"


def test_a_seed_names_random_weights() -> None:
    found = find_source(Reference(seed=0))
    assert isinstance(found, RandomWeights)
    assert found.seed == 0
    assert (found.weight_files(), found.model_files()) == ({}, {})


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the hub is asked for; its model has weights, a config and a tokenizer, at two commits."""
    requests: list[dict[str, Any]] = []
    for commit in (COMMIT, OTHER):
        (tmp_path / commit).mkdir()
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (tmp_path / commit / name).write_text("{}")

    def answer(request: dict[str, Any]) -> dict[str, str]:
        requests.append(request)
        return {"directory": str(tmp_path / (OTHER if request["revision"] == OTHER else COMMIT))}

    monkeypatch.setattr(hub, "_in_process", answer)
    monkeypatch.setattr(hub, "hub_cache", lambda: tmp_path / "hub")
    return requests


def test_the_hub_is_asked_once_for_each_set_of_files(asked: list[dict[str, Any]]) -> None:
    model = HubModel("org/model")
    assert model.commit() is None
    assert model.config() == {}
    assert model.commit() == COMMIT
    for _ in range(2):
        assert set(model.weight_files()) == {"model.safetensors"}
        assert set(model.model_files()) == {"config.json", "tokenizer.json"}
    assert [request["patterns"] for request in asked] == [
        ["config.json", "adapter_config.json"],
        [*hub._WHOLE],
    ]


def test_a_build_goes_on_with_the_commit_that_it_began_with(asked: list[dict[str, Any]]) -> None:
    model = HubModel("org/model")
    model.weight_files()
    assert model.at(None) is model.at(COMMIT) is model
    assert [path.parent.name for path in model.at(OTHER).weight_files().values()] == [OTHER]
    assert HubModel("org/model", OTHER).commit() == OTHER
    assert len(asked) == 2
