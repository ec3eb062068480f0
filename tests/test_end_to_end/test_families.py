"""Families of models that nothing in this project names: built, run and compared with transformers by `qualify`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from furiosa_build.build.build import Build
from furiosa_build.steps import qualify

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "vocab_size": 192,
    "max_position_embeddings": 256,
    "architectures": ["ForCausalLM"],
    "dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}

LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,  # the part with rotary positions
    **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32},
    "first_k_dense_replace": 1,
}

FAMILIES: dict[str, tuple[dict[str, Any], list[tuple[int, ...]]]] = {
    "mixture of experts after a dense layer": ({"model_type": "qwen3_moe", **MIXTURE}, [(0,), (1, 2, 3)]),
    "mixture of experts": ({"model_type": "mixtral", "num_local_experts": 4}, [(0, 1, 2, 3)]),
    "every fourth layer without rotary positions": ({"model_type": "smollm3"}, [(0, 1, 2), (3,)]),
    "full attention, then windows": ({"model_type": "qwen2", **WINDOW}, [(0, 1), (2, 3)]),
    "windows, and full attention without positions": (
        {"model_type": "cohere2", "sliding_window": 8},
        [(0, 1, 2), (3,)],
    ),
    "capped scores, and windows": ({"model_type": "gemma2", "sliding_window": 8}, [(0, 2), (1, 3)]),
    "attention sinks, and windows": (
        {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        [(0, 2), (1, 3)],
    ),
    "keys larger than values, after a dense layer": ({"model_type": "deepseek_v3", **LATENT}, [(0,), (1, 2, 3)]),
    "ALiBi": ({"model_type": "bloom", "n_head": 4, "n_layer": 4}, [(0, 1, 2, 3)]),
    "attention of its own": ({"model_type": "gptj", "rotary_dim": 8}, [(0, 1, 2, 3)]),
    "fused projections": ({"model_type": "phi3"}, [(0, 1, 2, 3)]),
    "half precision": ({"model_type": "llama", "dtype": "float16"}, [(0, 1, 2, 3)]),
}


@pytest.mark.grid
@pytest.mark.parametrize(
    "family",
    FAMILIES,
)
def test_a_family_is_built_and_qualifies(family: str, start_build: Callable[..., Build]) -> None:
    config, layers = FAMILIES[family]
    build = start_build({**SIZES, **config}, scheme="int8", rules=({"match": "lm_head.weight", "scheme": "none"},))
    for step in build.plan.steps:
        build.run(step)
    for kinds in build.plan.model.kinds.values():
        assert [kind.layers for kind in kinds if kind.layers] == layers
    figures = build.store.read_json(build.outcomes["qualify"].record, qualify.OUTPUT)
    assert figures["tokens"] >= 48
    # float32 through some tens of operations agrees to 1e-5 of the logits, float16 (11 bits) to a few 1e-3.
    share = {"float32": 1e-5, "float16": 5e-3}[build.plan.model.outline.dtype]
    assert figures["largest_logit_difference"] <= share * max(figures["largest_logit"], 1.0)
    assert figures["top1_agreement"] == 1.0
