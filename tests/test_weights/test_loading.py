"""Weights are those that transformers loads from the same directory, whatever they are called and however stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_models.tiny import LLAMA, QWEN2, TIED, save_random_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from furiosa_build.ir.loading import Loading
from furiosa_build.weights.converted import Converted
from furiosa_build.weights.directory import ModelDirectory
from furiosa_build.weights.formats import open_weight_files
from furiosa_build.weights.loading import find_loading
from test_weights.checkpoints import (
    change_config,
    change_tensors,
    only_the_head,
    other_head,
    rename,
    same_head,
    write_shards,
)

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    **SMALL,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
OF_QWEN: dict[str, Any] = {
    **QWEN2,
    **SMALL,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "head_dim": 8,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL,
    "qwen2_moe": {**OF_QWEN, "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]},
    "qwen3_moe": {**OF_QWEN, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
    "olmoe": {**OF_QWEN, "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"]},
    "granitemoe": {**MIXTRAL, "model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"]},
    "phimoe": {**MIXTRAL, "model_type": "phimoe", "architectures": ["PhimoeForCausalLM"]},
}


def loading_of(directory: Path, layers: int | None = None) -> Loading:
    source = ModelDirectory(directory)
    header = source.header()
    return find_loading(source.config(), layers, header.layouts, header.dtype, None)


def parameters_of(directory: Path) -> dict[str, Tensor]:
    """The parameters that a build takes, in the dtype that they are stored in."""
    loading = loading_of(directory)
    assert (loading.missing, loading.misshapen) == ([], [])
    files = [path for name, path in ModelDirectory(directory).weight_files().items() if not name.endswith(".json")]
    stored = open_weight_files(files)
    source = stored if loading.stored_as is None else Converted(stored, loading.hf_config, loading.stored_as)
    return {name: source.read(name) for name in source.names()}


def assert_as_transformers(directory: Path) -> Loading:
    expected = AutoModelForCausalLM.from_pretrained(directory)
    found = parameters_of(directory)
    for name, parameter in expected.named_parameters():
        assert found[name].to(parameter.dtype).equal(parameter), name
    loading = loading_of(directory)
    assert loading.hf_config["dtype"] == str(expected.dtype).removeprefix("torch.")
    return loading


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_that_are_stored_one_by_one(name: str, tmp_path: Path) -> None:
    """transformers writes them so, as every mixture on the hub has them."""
    save_random_model(MIXTURES[name], tmp_path)
    stored = set(load_file(tmp_path / "model.safetensors"))
    assert assert_as_transformers(tmp_path).stored_as
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not stored >= {name for name, _ in model.named_parameters()}, "they are stored otherwise"


PREFIXES: dict[str, Callable[[str], str]] = {
    "of the bare model": lambda name: name.removeprefix("model."),
    "twice": lambda name: name.replace("model.", "model.language_model.model.", 1),
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_with_another_prefix(prefix: str, tmp_path: Path) -> None:
    save_random_model(TIED, tmp_path)
    rename(tmp_path, PREFIXES[prefix])
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    if told["missing_keys"]:
        loading = loading_of(tmp_path)
        assert set(loading.missing) == set(told["missing_keys"]) - {"lm_head.weight"}
    else:
        assert assert_as_transformers(tmp_path).stored_as


def test_names_of_the_model_itself_are_not_converted(tmp_path: Path) -> None:
    assert assert_as_transformers(save_random_model(LLAMA, tmp_path)).stored_as is None


HEADS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], bool, int]] = {
    "another": (other_head, False, 1),
    "the same": (same_head, False, 1),
    "only": (only_the_head, True, 0),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_of_its_own_in_a_tied_model(head: str, tmp_path: Path) -> None:
    change, converts, copies = HEADS[head]
    save_random_model(TIED, tmp_path)
    change_tensors(tmp_path, change)
    loading = assert_as_transformers(tmp_path)
    assert (loading.stored_as is not None, len(loading.copies)) == (converts, copies)


def test_tensors_that_the_model_does_not_know(tmp_path: Path) -> None:
    """transformers warns of some, and ignores tables that are computed."""
    save_random_model(LLAMA, tmp_path)
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "v_head.weight": torch.ones(2)}
    change_tensors(tmp_path, lambda tensors: {**tensors, **more})
    assert assert_as_transformers(tmp_path).unused == ["v_head.weight"]


def test_further_layers_are_not_told_of(tmp_path: Path) -> None:
    save_random_model(LLAMA, tmp_path)
    assert loading_of(tmp_path, layers=1).unused == []
    assert loading_of(tmp_path, layers=1).hf_config["num_hidden_layers"] == 1


# Which files


def test_a_whole_file_goes_before_an_index(tmp_path: Path) -> None:
    save_random_model(LLAMA, tmp_path)
    old = {name: tensor + 1 for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    write_shards(tmp_path, old)
    assert set(ModelDirectory(tmp_path).weight_files()) == {"model.safetensors"}
    assert_as_transformers(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert len(ModelDirectory(tmp_path).weight_files()) == 3
    assert_as_transformers(tmp_path)


# The dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("index", [None, {}, {"dtype": "float32"}], ids=["whole", "shards", "shards with dtype"])
def test_the_dtype_of_the_checkpoint(dtype: str, index: Mapping[str, Any] | None, tmp_path: Path) -> None:
    save_random_model(LLAMA, tmp_path, getattr(torch, dtype))
    if index is not None:
        write_shards(tmp_path, load_file(tmp_path / "model.safetensors"), index)
        (tmp_path / "model.safetensors").unlink()
    change_config(tmp_path, drop=("dtype", "torch_dtype"))
    assert_as_transformers(tmp_path)
    change_config(tmp_path, dtype="bfloat16")
    assert loading_of(tmp_path).hf_config["dtype"] == "bfloat16"


def test_the_first_floating_point_tensor_says_the_dtype(tmp_path: Path) -> None:
    save_random_model(LLAMA, tmp_path, torch.bfloat16)
    change_tensors(
        tmp_path,
        lambda tensors: {
            name: tensor.float() if name.startswith("lm_head") else tensor for name, tensor in tensors.items()
        },
    )
    change_config(tmp_path, drop=("dtype", "torch_dtype"))
    assert_as_transformers(tmp_path)
