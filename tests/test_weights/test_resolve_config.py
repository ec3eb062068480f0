"""Oddities of config.json: what transformers loads is taken, and what it refuses is refused with its reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_models.tiny import LLAMA, QWEN2, read_config, save_random_model
from transformers import AutoConfig, AutoModelForCausalLM

from furiosa_build.core.errors import UserError
from furiosa_build.models.skeleton import make_config
from furiosa_build.weights.config import config_of
from furiosa_build.weights.directory import ModelDirectory
from furiosa_build.weights.resolve_config import causal_model, resolve_config
from test_weights.checkpoints import change_config

DROPPED = object()
ODD: dict[str, dict[str, Any]] = {
    "no dtype": {"dtype": None},
    "dtype by its old name": {"dtype": DROPPED, "torch_dtype": "bfloat16"},
    "no end": {"eos_token_id": []},
    "no architectures": {"architectures": None},
    "no length": {"max_position_embeddings": DROPPED},
    "an infinite number": {"time_step_limit": [0.0, math.inf]},
    "a whole number for theta": {"rope_parameters": DROPPED, "rope_theta": 10000},
    "code of its own": {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}},
    "a padding token before the first": {"pad_token_id": -1},
    "no padding token": {"pad_token_id": None},
    "rope scaling of the old form": {"rope_parameters": DROPPED, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "quantized by nothing": {"quantization_config": None},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "rope without its factor": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    "a rope that there is not": ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "su"),
    "a number as text": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    "heads that do not divide": ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden size"),
    "an activation that there is not": ({"hidden_act": "swiglu"}, "swiglu"),
    "a vocabulary and a half": ({"vocab_size": 192.5}, "vocab_size"),
    "types of too few layers": ({"layer_types": ["full_attention"]}, "num_hidden_layers"),
    "a padding token beyond the vocabulary": ({"pad_token_id": 192}, "pad_token_id=192"),
    "no such model": ({"model_type": "lama"}, "unsupported architecture: model_type 'lama'"),
    "an encoder": ({"model_type": "vit"}, "transformers has no causal language model for it"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(LLAMA, tmp_path_factory.mktemp("llama"))


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").symlink_to(saved / "model.safetensors")
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    return tmp_path


def spoil(directory: Path, fields: dict[str, Any]) -> None:
    dropped = tuple(key for key, value in fields.items() if value is DROPPED)
    change_config(directory, dropped, **{key: value for key, value in fields.items() if value is not DROPPED})


def resolved(directory: Path, layers: int | None = None) -> dict[str, Any]:
    source = ModelDirectory(directory)
    header = source.header()
    return resolve_config(source.config(), layers, header.dtype)


@pytest.mark.parametrize("oddity", ODD)
def test_what_transformers_loads_is_taken(oddity: str, directory: Path) -> None:
    spoil(directory, ODD[oddity])
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    fields = resolved(directory)
    json.dumps(fields, allow_nan=False)
    ours = make_config(fields)
    expected, found = theirs.config.to_dict(), ours.to_dict()
    for own in ("_name_or_path", "transformers_version", "architectures", "auto_map", "quantization_config"):
        expected.pop(own, None), found.pop(own, None)
    assert found == expected
    assert type(causal_model(fields)) is type(theirs)


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_transformers_refuses_is_refused_with_its_reason(mistake: str, directory: Path) -> None:
    fields, reason = REFUSED[mistake]
    spoil(directory, fields)
    with pytest.raises(Exception):  # noqa: B017, PT011 (whatever it is)
        AutoModelForCausalLM.from_pretrained(directory)
    with pytest.raises(UserError) as error:
        causal_model(resolved(directory))
    assert reason in str(error.value)
    assert error.value.where.startswith("config.json")


@pytest.mark.parametrize("written", ["auto", "torch.float32", None])
def test_a_dtype_that_names_none_is_that_of_the_weights(written: str | None, directory: Path) -> None:
    change_config(directory, dtype=written)
    assert resolved(directory)["dtype"] == "float32"


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("empty", [None, {}])
def test_an_empty_quantization_config_says_nothing(key: str, empty: object, directory: Path) -> None:
    from furiosa_build.recipe.schema import ModelSpec

    change_config(directory, **{key: empty})
    assert key not in config_of(ModelSpec(model_id_or_path="x"), ModelDirectory(directory), own_weights=True)


# Fewer layers


def test_a_list_is_cut_if_it_is_of_the_layers() -> None:
    types = ["full_attention", "sliding_attention", "full_attention"]
    fields = {**QWEN2, "eos_token_id": [1, 2, 3], "layer_types": types, "use_sliding_window": True}
    cut = resolve_config(fields, 2, None)
    assert cut["eos_token_id"] == [1, 2, 3]
    assert cut["layer_types"] == types[:2]
    assert causal_model(cut).config.num_hidden_layers == 2


def test_a_list_that_a_class_makes_as_long_as_the_model_is_cut() -> None:
    """SmolLM3 says of each layer whether it has rotary positions."""
    fields = {
        **{key: value for key, value in LLAMA.items() if key != "rope_parameters"},
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "no_rope_layers": [1, 0, 1],
        "eos_token_id": [1, 2, 3],
    }
    cut = resolve_config(fields, 2, None)
    assert (cut["no_rope_layers"], cut["eos_token_id"]) == ([1, 0], [1, 2, 3])


def test_all_layers_or_more_cut_nothing(saved: Path) -> None:
    for layers in (None, 3, 4):
        assert resolve_config(read_config(saved), layers, None)["num_hidden_layers"] == 3


def test_a_mistral_with_layers_of_several_types_is_what_transformers_takes_it_for(tmp_path: Path) -> None:
    fields = {**LLAMA, "model_type": "mistral", "layer_types": ["full_attention"] * 3}
    fields.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert resolve_config(fields, None, None)["model_type"] == AutoConfig.from_pretrained(tmp_path).model_type


def test_the_longest_sequence_is_known_by_its_other_name() -> None:
    fields = {"model_type": "mpt", "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 96}
    assert resolve_config(fields, None, "float32")["max_position_embeddings"] == 96


def test_what_transformers_warned_of_is_told_without_the_whole_config() -> None:
    fields = {"model_type": "falcon", "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16}
    with pytest.raises(UserError, match="property 'head_dim' of 'FalconConfig' object has no setter") as error:
        resolve_config(fields, None, "float32")
    assert error.value.hint == "Can't set head_dim with value 16 for FalconConfig"
