"""A model that does not fit into memory: transformers loads each layer of it by itself, and says the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import grid
from safetensors.torch import load_file, save_file
from test_models.tiny import GEMMA3, LLAMA, TIED, save_random_model
from test_weights.checkpoints import change_config, change_tensors, only_the_head, other_head, rename, same_head
from test_weights.multimodal import WHOLE, save_multimodal
from test_weights.test_loading import MIXTURES

from furiosa_build.core.errors import StepError
from furiosa_build.core.system import Machine
from furiosa_build.steps.qualification import judge as judging
from furiosa_build.steps.qualification.original_model import LayeredOriginalModel, OriginalModel
from furiosa_build.steps.qualification.reference import Asked
from test_steps.test_qualify import SMALL, SOURCE, StartBuild, judge, qualify_of, refusal

STORED: dict[str, Callable[[Path], object]] = {
    "as it is": lambda directory: save_random_model(LLAMA, directory),
    "cast": lambda directory: change_config(save_random_model(LLAMA, directory, torch.bfloat16), dtype="float32"),
    "sliding and full": lambda directory: save_random_model(GEMMA3, directory),
    "experts one by one": lambda directory: save_random_model(MIXTURES["mixtral"], directory),
    "another head": lambda directory: change_tensors(save_random_model(TIED, directory), other_head),
    "the same head": lambda directory: change_tensors(save_random_model(TIED, directory), same_head),
    "only the head": lambda directory: change_tensors(save_random_model(TIED, directory), only_the_head),
    "the bare model": lambda directory: rename(
        save_random_model(TIED, directory), lambda name: name.removeprefix("model.")
    ),
    "with images": lambda directory: save_multimodal(WHOLE["gemma3"], directory),
}


@pytest.mark.parametrize("stored", grid(STORED, ["cast", "experts one by one", "another head", "with images"]))
def test_it_is_the_model_that_transformers_loads(stored: str, tmp_path: Path) -> None:
    STORED[stored](tmp_path)
    asked = [Asked(torch.arange(3, 40), torch.tensor([0, 20, 36])), Asked(torch.arange(9), torch.tensor([8]))]
    whole, layered = OriginalModel(tmp_path, "model.layers"), LayeredOriginalModel(tmp_path, "model.layers")
    assert layered.dtype == whole.dtype
    for one, other in zip(layered.run(asked), whole.run(asked), strict=True):
        assert torch.equal(one, other)
    parameters = dict(whole.parameters())
    names = set()
    for name, tensor in layered.parameters():
        assert torch.equal(tensor, parameters[name])
        names.add(name)
    assert names == parameters.keys()
    inside = [tensor for name, tensor in layered.model.state_dict().items() if re.search(r"model\.layers\.\d", name)]
    assert inside
    assert all(tensor.is_meta for tensor in inside), "no layer stays"


@pytest.fixture
def _without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "this_machine", lambda: Machine(1, 0, 0))


@pytest.mark.usefixtures("_without_memory")
@pytest.mark.parametrize(("name", "scheme"), grid([("llama", "int8"), ("mixtral", "none")], [("llama", "int8")]))
def test_a_sound_artifact_qualifies(
    name: str, scheme: str, start_build: StartBuild, output: Path, tmp_path: Path
) -> None:
    model = save_random_model({"llama": LLAMA, **MIXTURES}[name], tmp_path / "model")
    found = judge(qualify_of(start_build(model, scheme=scheme, **SMALL)), output)
    assert found["top1_agreement"] == 1.0
    assert found["largest_logit_difference"] <= found["allowed_logit_difference"] / 5
    assert ("quantization_perplexity" in found) == (scheme != "none"), "measured against the published model too"


def another_parameter(weights: dict[str, Any]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"][17:18] *= -1


def swapped_experts(weights: dict[str, Any]) -> None:
    one, other = (f"model.layers.1.block_sparse_moe.experts.{i}.w1.weight" for i in (0, 3))
    weights[one], weights[other] = weights[other], weights[one]


def head_of_its_own(weights: dict[str, Any]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()


OTHER = "is another tensor by transformers (which file, and which name in it, was read?)"
WRONG: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], None], str]] = {
    "parameter": (LLAMA, another_parameter, f"model.layers.1.mlp.down_proj.weight {OTHER}"),
    "experts": (MIXTURES["mixtral"], swapped_experts, f"model.layers.1.mlp.experts.gate_up_proj {OTHER}"),
    "head": (TIED, head_of_its_own, "lm_head.weight is a parameter of its own by transformers, and tied to another"),
}


@pytest.mark.usefixtures("_without_memory")
@pytest.mark.parametrize("what", grid(WRONG, ["head"]))
def test_weights_that_the_build_has_read_otherwise_fail(
    what: str, start_build: StartBuild, output: Path, tmp_path: Path
) -> None:
    """The artifact is made of other weights than those that transformers finds in the source."""
    config, change, expected = WRONG[what]
    model = save_random_model(config, tmp_path / "model")
    of = qualify_of(start_build(model, **SMALL))
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "other.safetensors", {"format": "pt"})
    why = refusal(of.with_files({SOURCE: tmp_path / "other.safetensors"}), output)
    assert "the artifact's logits are not the model's" in why
    assert expected in why


@pytest.mark.grid
@pytest.mark.usefixtures("_without_memory")
def test_shards_of_a_stale_index_fail(start_build: StartBuild, output: Path, tmp_path: Path) -> None:
    """As if the build had taken what an index names, beside a single file that transformers prefers."""
    model = save_random_model(LLAMA, tmp_path / "model")
    of = qualify_of(start_build(model, **SMALL))
    weights = load_file(model / "model.safetensors")
    shard, index = "model-00001-of-00001.safetensors", tmp_path / "index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}))
    save_file({name: -tensor for name, tensor in weights.items()}, tmp_path / "single", {"format": "pt"})
    files = {SOURCE: tmp_path / "single", f"source/{shard}": model / "model.safetensors"}
    why = refusal(of.with_files({**files, "source/model.safetensors.index.json": index}), output)
    assert OTHER in why


@pytest.mark.grid
@pytest.mark.usefixtures("_without_memory")
def test_quantized_tensors_that_are_swapped_fail(start_build: StartBuild, output: Path, tmp_path: Path) -> None:
    model = save_random_model(LLAMA, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    gate, up = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]
    save_file(weights, tmp_path / "swapped.safetensors", {"format": "pt"})
    of = qualify_of(start_build(model, scheme="fp8", **SMALL))
    why = refusal(of.with_files({SOURCE: tmp_path / "swapped.safetensors"}), output)
    assert f"the quantized {gate} is not that of the source: it differs by 14" in why


def test_a_parameter_that_the_source_lacks_fails(tmp_path: Path) -> None:
    lost = "model.layers.2.mlp.up_proj.weight"
    change_tensors(save_random_model(LLAMA, tmp_path), lambda weights: {n: t for n, t in weights.items() if n != lost})
    with pytest.raises(StepError, match=f"the source has no weights for {lost}: "):
        LayeredOriginalModel(tmp_path, "model.layers")


def test_a_model_with_layers_elsewhere_fails(tmp_path: Path) -> None:
    save_random_model(LLAMA, tmp_path)
    with pytest.raises(StepError, match=r"the source's model, as transformers makes it, has no model.blocks"):
        LayeredOriginalModel(tmp_path, "model.blocks")
