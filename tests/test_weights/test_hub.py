"""Models on the hub, asked for over HTTP from a hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub, fake_hub, use
from grid import grid
from safetensors.torch import load_file
from test_models.tiny import LLAMA, save_random_model

from furiosa_build.core.errors import UserError
from furiosa_build.weights.directory import ModelDirectory
from furiosa_build.weights.hub import HubModel
from test_weights.checkpoints import change_config, write_shards

NAME = "org/model"
LARGE: dict[str, Any] = {**LLAMA, "vocab_size": 4096}
"""Its file of weights has more bytes than are read for a header."""
HEADER = 100_001
"""Bytes that the hub's library reads of a file to have its header, in one request."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as it is on the hub. Not to be changed."""
    return save_random_model(LARGE, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def hub(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that has the model, and an empty cache."""
    with fake_hub() as hub:
        hub.put(NAME, directory)
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


def test_headers_are_read_without_the_weights(hub: FakeHub, directory: Path) -> None:
    model = HubModel(NAME)
    assert model.header() is None, "the hub has not been asked for the config"
    assert model.config() == ModelDirectory(directory).config()
    assert model.header() == ModelDirectory(directory).header()
    assert hub.sent("model.safetensors")[-1:] == [HEADER]
    assert sum(hub.sent("model.safetensors")) == HEADER < (directory / "model.safetensors").stat().st_size


def test_headers_of_shards(hub: FakeHub, directory: Path, tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_bytes((directory / "config.json").read_bytes())
    change_config(sharded, drop=("dtype",))
    write_shards(sharded, load_file(directory / "model.safetensors"), {"dtype": "bfloat16"})
    hub.put(NAME, sharded)
    model = HubModel(NAME)
    model.config()
    found = model.header()
    assert found is not None
    assert (found.layouts, found.dtype) == (ModelDirectory(directory).header().layouts, "bfloat16")
    assert set(model.weight_files()) == set(ModelDirectory(sharded).weight_files())
    assert model.header() == found


def test_each_file_is_transferred_once(hub: FakeHub, directory: Path) -> None:
    model = HubModel(NAME)
    model.config()
    model.model_files()
    weights = model.weight_files()["model.safetensors"]
    assert weights.read_bytes() == (directory / "model.safetensors").read_bytes()
    HubModel(NAME).weight_files()
    files = {path.name for path in directory.iterdir()}
    assert {name: [sent for sent in hub.sent(name) if sent] for name in files} == {
        name: [(directory / name).stat().st_size] for name in files
    }


def test_a_branch_that_moves_meanwhile(hub: FakeHub, directory: Path, tmp_path: Path) -> None:
    first = hub.revisions[NAME, "main"]
    model = HubModel(NAME)
    model.config()
    save_random_model(LLAMA, tmp_path / "other")
    second = hub.put(NAME, tmp_path / "other")
    assert model.header() == ModelDirectory(directory).header()
    assert [path.parent.name for path in model.weight_files().values()] == [first]
    assert model.commit() == first
    later = HubModel(NAME)
    assert later.config()["vocab_size"] == LLAMA["vocab_size"]
    assert later.commit() == second


@pytest.mark.parametrize("revision", grid(["v1", "commit"], ["v1"]))
def test_a_revision(revision: str, hub: FakeHub, tmp_path: Path) -> None:
    save_random_model(LLAMA, tmp_path / "other")
    commit = hub.put(NAME, tmp_path / "other", "v1")
    model = HubModel(NAME, commit if revision == "commit" else revision)
    assert model.config()["vocab_size"] == LLAMA["vocab_size"]
    assert model.header() == ModelDirectory(tmp_path / "other").header()
    assert model.commit() == commit


def test_a_transfer_that_is_cut_goes_on(hub: FakeHub, directory: Path) -> None:
    hub.cuts["model.safetensors"] = 5000
    path = HubModel(NAME).weight_files()["model.safetensors"]
    assert path.read_bytes() == (directory / "model.safetensors").read_bytes()
    assert len(hub.sent("model.safetensors")) == 2


def test_without_the_hub_its_cache_is_used(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    online = HubModel(NAME)
    online.config()
    files = online.weight_files()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    number = len(hub.asked)
    model = HubModel(NAME)
    assert model.commit() == hub.revisions[NAME, "main"]
    assert model.config() == online.config()
    assert (model.weight_files(), model.header()) == (files, online.header())
    assert len(hub.asked) == number


def refusal(revision: str | None = None, name: str = NAME) -> tuple[str, str]:
    with pytest.raises(UserError) as error:
        HubModel(name, revision).config()
    before = f"model {name!r} (revision {revision or 'main'}) could not be fetched: "
    assert error.value.what.startswith(before)
    return error.value.what.removeprefix(before), error.value.hint.partition(". A local copy works as well")[0]


def test_a_gated_model(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    what = "access to it is restricted"
    where = f"ask for it at {hub.url}/{NAME}, and set HF_TOKEN"
    assert refusal() == (what, f"{where} (not set) to a token that has it")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refusal() == (what, f"{where} (set) to a token that has it")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert HubModel(NAME).config()["vocab_size"] == 4096
    hub.is_granted = False
    (tmp_path / "config.json").write_text("{}")
    hub.put(NAME, tmp_path)
    assert refusal() == (what, f"{where} (set) to a token that has it")


@pytest.mark.usefixtures("hub")
def test_what_the_hub_has_not() -> None:
    assert refusal(name="org/none") == (
        "the hub has no model of this name, or it is private",
        "if it is private, set HF_TOKEN (not set) to a token that may read it",
    )
    assert refusal("v9") == ("it has no revision 'v9'", "name a branch, a tag or a commit of it by model.revision")


def test_a_hub_that_fails(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.failing = 500
    assert refusal() == (
        f"the hub, {hub.url}, answers 500 Internal Server Error",
        "HF_TOKEN is not set; else try again later",
    )
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    what, hint = refusal()
    assert what.startswith("the hub, http://127.0.0.1:9, cannot be reached (ConnectError: ")
    assert hint == "is the network there?"


def test_a_model_without_safetensors_is_known_by_its_files(hub: FakeHub, directory: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    for name, content in {"config.json": (directory / "config.json").read_bytes(), "pytorch_model.bin": b""}.items():
        (tmp_path / "old" / name).write_bytes(content)
    hub.put(NAME, tmp_path / "old")
    model = HubModel(NAME)
    model.config()
    with pytest.raises(UserError, match=r"the weights are pickles \(pytorch_model.bin\)") as error:
        model.header()
    assert error.value.where == NAME
    assert not hub.sent("pytorch_model.bin")
