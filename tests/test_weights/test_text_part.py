"""The text part of a multimodal checkpoint gives the logits that transformers gives for the whole of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from furiosa_build.core.errors import UserError
from furiosa_build.weights.resolve_config import causal_model
from test_weights.checkpoints import change_config
from test_weights.multimodal import TEXT_ALONE, WHOLE, save_multimodal
from test_weights.test_loading import loading_of, parameters_of

TOKENS = torch.arange(40)[None] * 7 % 180


def assert_same_logits(directory: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    loading = loading_of(directory)
    made = causal_model(loading.hf_config)
    assert loading.hf_config["dtype"] == str(expected.dtype).removeprefix("torch.")
    found = parameters_of(directory)
    alone = type(made)._from_config(made.config, dtype=expected.dtype, attn_implementation="eager").eval()
    given = {name: found[name] for name, _ in alone.named_parameters()}
    alone.load_state_dict({**alone.state_dict(), **given})
    alone.tie_weights()
    with torch.no_grad():
        logits = alone(TOKENS).logits
        assert logits.std() > 0.1
        assert torch.equal(logits, expected(TOKENS).logits)


@pytest.mark.parametrize("name", [*WHOLE, *TEXT_ALONE])
def test_the_text_part(name: str, tmp_path: Path) -> None:
    save_multimodal({**WHOLE, **TEXT_ALONE}[name], tmp_path)
    assert_same_logits(tmp_path)


def test_fields_of_the_whole(tmp_path: Path) -> None:
    """What transformers reads of the whole config where it loads the whole."""
    save_multimodal(WHOLE["gemma3"], tmp_path, torch.bfloat16)
    change_config(tmp_path, eos_token_id=[1, 106], dtype="bfloat16")
    found = loading_of(tmp_path).hf_config
    assert (found["eos_token_id"], found["dtype"], found["tie_word_embeddings"]) == ([1, 106], "bfloat16", True)
    assert (found["model_type"], found["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert_same_logits(tmp_path)


def test_the_first_layers(tmp_path: Path) -> None:
    save_multimodal(WHOLE["gemma3"], tmp_path)
    loading = loading_of(tmp_path, layers=2)
    assert loading.hf_config["layer_types"] == ["sliding_attention", "full_attention"]
    assert (loading.missing, loading.unused) == ([], [])


@pytest.mark.parametrize("model_type", ["llava", "emu3"])
def test_what_transformers_has_no_text_model_for(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    change_config(tmp_path, model_type=model_type)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="transformers has no causal language model for"):
        loading_of(tmp_path)
