"""What tracing takes for granted, in models that break it: each is refused for what it does, not for its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.mistral import modeling_mistral

from furiosa_build.core.errors import UserError
from furiosa_build.models.checks import check_model
from furiosa_build.models.noise import cheap_noise
from furiosa_build.models.skeleton import Skeleton

from .tiny import LLAMA

SIZES: dict[str, Any] = {name: value for name, value in LLAMA.items() if name not in ("model_type", "rope_parameters")}
LATENT = {
    "num_key_value_heads": 4,
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a bias that the layer makes": ({"model_type": "doge"}, "gives its attention a mask or bias that it makes itself"),
    "two attentions in a layer": ({"model_type": "diffllama"}, "attends 2 times"),
    "attention in chunks": (
        {"model_type": "llama4_text", "num_local_experts": 4, "attention_chunk_size": 16},
        r"is not causal: token \d+ does not attend to token \d+",
    ),
    "attention to what comes later": (
        {"model_type": "llama", "is_causal": False},
        "is not causal: token 0 attends to token 1",
    ),
    "keys of another layer": (
        {
            "model_type": "gemma3n_text",
            "num_hidden_layers": 4,
            "head_dim": 16,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": 192,
            "hidden_size_per_layer_input": 8,
        },
        "adds to its KV cache 0 times",
    ),
    "an encoder": ({"model_type": "bert"}, "is not causal: token 0 attends to token 1"),
    "convolutions": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"]},
        "keep another state between tokens",
    ),
    "state-space layers": ({"model_type": "bamba", "attn_layer_indices": [1]}, "keep another state between tokens"),
    "sparse attention": (
        {"model_type": "deepseek_v32", **LATENT},
        "keeps a state between tokens beside keys and values",
    ),
    "a window that attention of its own counts from the end of its cache": (
        {"model_type": "gpt_neo", "attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
        r"\(layer 1\) has attention of its own, which over a paged KV cache gives something else, such as for 4 tokens "
        "after 5 in a context of 24",
    ),
    "ALiBi that two attentions of transformers take differently": (
        {"model_type": "falcon", "alibi": True},
        r"transformers has two attentions for FalconDecoderLayer \(layer 0\), sdpa and eager, which do not give",
    ),
    "a model without a KV cache": (
        {"model_type": "openai-gpt"},
        "does not keep keys and values of each token",
    ),
    "positions counted in the cache": (
        {"model_type": "bart", "d_model": 64, "decoder_layers": 3},
        "'hidden_states', which for one token",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_tracing_would_get_wrong_is_refused(kind: str) -> None:
    config, reason = REFUSED[kind]
    with pytest.raises(UserError, match=reason):
        check_model(Skeleton({**SIZES, **config}))


ACCEPTED: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "capped scores": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 8},
    "sinks": {"model_type": "gpt_oss", "head_dim": 16, "num_local_experts": 4, "sliding_window": 4096},
    "keys larger than values": {"model_type": "deepseek_v3", **LATENT},
    "partial rotary": {"model_type": "glm", "head_dim": 16},
    "learned positions": {"model_type": "gpt2"},
    "ALiBi": {"model_type": "bloom"},
    "ALiBi counted from the end": {"model_type": "mpt", "n_heads": 4, "n_layers": 2, "d_model": 64},
    "rotary positions in attention of its own": {"model_type": "gptj", "rotary_dim": 8},
    "attention of its own in two ways": {"model_type": "falcon"},
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_paged_attention_computes_is_accepted(kind: str) -> None:
    check_model(Skeleton({**SIZES, **ACCEPTED[kind]}))


def test_a_window_that_the_attention_is_not_told_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask alone has it then, which paged attention never sees."""
    skeleton = Skeleton({**SIZES, "model_type": "mistral", "sliding_window": 5000})
    check_model(skeleton)
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", modeling_mistral.create_causal_mask)
    with pytest.raises(UserError, match=r"is not causal over 5000 tokens: token \d+ attends to token 0"):
        check_model(skeleton)


def test_noise_of_any_shape_takes_little_memory() -> None:
    noise = cheap_noise((128_000, 4096), 0)
    assert noise.shape == (128_000, 4096)
    assert noise.untyped_storage().nbytes() < 1_000_000
    assert not torch.equal(noise[0], noise[1])
