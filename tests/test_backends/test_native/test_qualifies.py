"""Artifacts of backend native: built, run and compared with transformers by `qualify`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from grid import grid

from furiosa_build.build.build import Build
from furiosa_build.steps import qualify

from .graphs import model

ARTIFACTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied, in bfloat16": {"tie_word_embeddings": True, "dtype": "bfloat16"},
    "windows, capped scores": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 8},
    "norms of queries and keys": {"model_type": "qwen3", "head_dim": 16},
    "attention of its own": {"model_type": "gptj", "rotary_dim": 8},
    "a mixture": {"model_type": "mixtral", "num_local_experts": 4},
    "rotary positions of complex numbers, in two stages": {
        **{"model_type": "deepseek_v2", "num_key_value_heads": 4, "head_dim": 8, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1},
        **{"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 8},
        "parallel": {"pipeline_parallel_size": 2},
    },
    "two ranks": {"parallel": {"tensor_parallel_size": 2}},
    "int8": {"scheme": "int8"},
    "codes in KV caches, two ranks": {"kv_cache_dtype": "int8", "parallel": {"tensor_parallel_size": 2}},
    "codes in KV caches, windows": {
        **{"model_type": "gemma2", "head_dim": 16, "sliding_window": 8, "kv_cache_dtype": "fp8"},
        "paged_attention_block_size": 3,
    },
    "codes in KV caches, beams": {
        **{"kv_cache_dtype": "int8", "dtype": "bfloat16"},
        "kv_cache_sharing_across_beams_config": {"beam_width": 3, "max_new_tokens": 8},
    },
    "int4 with zero points, two ranks": {
        **{"scheme": "int4", "group_size": 32, "symmetric": False, "parallel": {"tensor_parallel_size": 2}},
        **{"intermediate_size": 128, "hidden_size": 64},
    },
    "int4 with a head of int8, which is the embedding, two ranks": {
        **{"scheme": "int4", "group_size": 32, "lm_head": "int8", "parallel": {"tensor_parallel_size": 2}},
        **{"rules": ({"match": "*embed*", "scheme": "none"},), "tie_word_embeddings": True, "dtype": "bfloat16"},
        **{"intermediate_size": 128, "hidden_size": 64},
    },
    "fp8, in two stages": {"scheme": "fp8", "parallel": {"pipeline_parallel_size": 2}},
}
SETTINGS = (
    *("scheme", "group_size", "symmetric", "lm_head", "rules", "parallel"),
    *("kv_cache_dtype", "paged_attention_block_size", "kv_cache_sharing_across_beams_config"),
)
"""What is of the recipe; all else is of config.json."""
SHARES = {"float32": 1e-5, "bfloat16": 3e-2}
"""How far logits may differ, of the largest."""


@pytest.mark.parametrize("name", grid(ARTIFACTS, []))
def test_an_artifact_qualifies_and_gives_the_tokens_of_transformers(
    name: str, start_build: Callable[..., Build]
) -> None:
    fields = dict(ARTIFACTS[name])
    settings = {key: fields.pop(key) for key in SETTINGS if key in fields}
    config = {"architectures": ["ForCausalLM"], "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1}
    config |= model(**{"model_type": "llama", "vocab_size": 192, "pad_token_id": 2, **fields})
    build = start_build(config, backend="native", **settings)
    for step in build.plan.steps:
        build.run(step)
    figures = build.store.read_json(build.outcomes["qualify"].record, qualify.OUTPUT)
    assert figures["tokens"] >= 48
    if "kv_cache_dtype" in settings:  # a number between two codes may become either
        assert figures["largest_logit_difference"] <= figures["allowed_logit_difference"]
        return
    assert figures["largest_logit_difference"] <= SHARES[config["dtype"]] * max(figures["largest_logit"], 1.0)
    if config["dtype"] == "float32":
        assert figures["top1_agreement"] == 1.0
