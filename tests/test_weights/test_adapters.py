"""An adapter is never ignored: transformers, where peft is installed, would apply it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub, fake_hub, use

from furiosa_build.core.errors import UserError
from furiosa_build.weights.directory import ModelDirectory
from furiosa_build.weights.hub import HubModel

LORA = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "acme/base"})


@pytest.fixture(params=["beside a model", "alone"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The directory of an adapter."""
    directory = tmp_path / "a directory"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(LORA)
    if request.param != "alone":
        (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        yield hub


def refusal(source: ModelDirectory | HubModel) -> UserError:
    """Of the config; and of the weights, where a recipe has the config."""
    with pytest.raises(UserError) as error:
        source.config()
    with pytest.raises(UserError) as of_weights:
        source.weight_files()
    assert str(of_weights.value) == str(error.value)
    return error.value


def commands(error: UserError) -> list[str]:
    """What the hint says to run."""
    merging = error.hint.partition("(pip install peft): ")[2].partition(", copy the tokenizer's files")[0]
    return shlex.split(merging)


def test_an_adapter_in_a_directory(adapter: Path) -> None:
    error = refusal(ModelDirectory(adapter))
    alone = not (adapter / "config.json").exists()
    assert error.where == str(adapter / "adapter_config.json")
    assert error.what == (
        "this is an adapter (LORA) of 'acme/base' and not a model: this version does not apply adapters"
        if alone
        else "the model's directory has an adapter (LORA), which this version does not apply"
    )
    assert commands(error)[-1].endswith(".merge_and_unload().save_pretrained('MERGED')")
    assert (f"{adapter}/adapter_*" in commands(error)) == (not alone)
    compile(commands(error)[-1], "the command", "exec")


def test_an_adapter_on_the_hub(adapter: Path, hub: FakeHub) -> None:
    hub.put("org/adapter", adapter)
    error = refusal(HubModel("org/adapter"))
    assert error.where == "org/adapter"
    assert "AutoPeftModelForCausalLM as M; M.from_pretrained('org/adapter')" in commands(error)[-1]
    assert len(hub.sent("adapter_config.json")) == 1


def test_a_model_without_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert ModelDirectory(tmp_path).config() == {}
