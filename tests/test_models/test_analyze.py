from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import Any

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.ir.outline import Outline
from furiosa_build.models.analyze import survey
from furiosa_build.weights.random import RandomSource

from .tiny import GEMMA3, LLAMA, MISTRAL, MODELS, QWEN2, QWEN3, TIED

ROTARY = {f"position_embeddings.{i}": f"layers.0.position_embeddings.{i}" for i in range(2)}

SMOLLM3: dict[str, Any] = {
    **LLAMA,
    "model_type": "smollm3",
    "architectures": ["SmolLM3ForCausalLM"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "num_hidden_layers": 4,
    "no_rope_layer_interval": 2,
}
QWEN3_MOE: dict[str, Any] = {
    **QWEN3,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [1],
}
SIZES: dict[str, Any] = {name: value for name, value in LLAMA.items() if name not in ("model_type", "rope_parameters")}
PHIMOE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
    **{"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "short_mscale": 1.0, "long_mscale": 1.5},
}
DEEPSEEK: dict[str, Any] = {
    **SIZES,
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}


@cache
def llama() -> Outline:
    return survey(LLAMA)


def layers(outline: Outline) -> list[list[int]]:
    return [block.layers for block in outline.blocks]


@pytest.mark.parametrize("name", ["llama", "tied", "mistral", "qwen2", "qwen3"])
def test_layers_that_are_alike_are_one_kind(name: str) -> None:
    outline = survey(MODELS[name])
    assert layers(outline) == [[0, 1, 2]]
    assert outline.blocks[0].inputs == ROTARY
    assert outline.first_outputs == [(0, "position_embeddings.0"), (0, "position_embeddings.1")]


def test_an_outline_says_what_planning_needs() -> None:
    outline = llama()
    assert outline.architecture == "LlamaForCausalLM"
    assert (outline.dtype, outline.vocab_size, outline.layer_prefix) == ("float32", 192, "model.layers.")
    assert outline.blocks[0].cache_shape == [2, 16]
    assert outline.first_parameters == ["model.embed_tokens.weight"]
    assert outline.last_parameters == ["lm_head.weight", "model.norm.weight"]
    assert outline.parameters["lm_head.weight"].linear
    assert outline.parameters["model.layers.2.self_attn.k_proj.weight"].shape == [32, 64]
    assert outline.parameters["model.layers.2.self_attn.k_proj.weight"].linear
    assert not outline.parameters["model.embed_tokens.weight"].linear
    assert not outline.parameters["model.norm.weight"].linear
    assert outline.num_parameters == 192 * 64 * 2 + 64 + 3 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96 + 2 * 64)


def test_a_tied_head_is_the_embedding_and_no_linear_layer() -> None:
    outline = survey(TIED)
    assert "lm_head.weight" not in outline.parameters
    assert outline.last_parameters == ["model.embed_tokens.weight", "model.norm.weight"]
    assert not outline.parameters["model.embed_tokens.weight"].linear


def test_biases_and_norms_are_parameters_of_a_block() -> None:
    assert "self_attn.q_proj.bias" in survey(QWEN2).blocks[0].parameters
    block = survey(QWEN3).blocks[0]
    assert "self_attn.q_norm.weight" in block.parameters
    assert block.cache_shape == [2, 32]


def test_a_window_makes_another_kind() -> None:
    """Qwen2 has windows from layer `max_window_layers` on, if at all."""
    window = {"sliding_window": 8, "max_window_layers": 1}
    assert layers(survey({**QWEN2, **window, "use_sliding_window": True})) == [[0], [1, 2]]
    assert layers(survey({**QWEN2, **window, "use_sliding_window": False})) == [[0, 1, 2]]


def test_the_size_of_a_window_is_part_of_the_signature() -> None:
    one, other = (survey({**MISTRAL, "sliding_window": size}).blocks[0].signature for size in (12, 13))
    assert one != other


def test_kinds_may_take_different_rotary_tables() -> None:
    outline = survey(GEMMA3)
    assert layers(outline) == [[0, 1, 3], [2]]
    sliding, full = outline.blocks
    assert sliding.inputs == ROTARY
    assert full.inputs == {f"position_embeddings.{i}": f"layers.2.position_embeddings.{i}" for i in range(2)}
    assert {layer for layer, _ in outline.first_outputs} == {0, 2}


def test_equal_programs_with_other_inputs_are_another_kind() -> None:
    """With a window longer than any context both of Gemma's kinds compute the same, on different rotary tables."""
    sliding, full = survey({**GEMMA3, "sliding_window": 2**21}).blocks
    assert sliding.signature == full.signature
    assert sliding.inputs != full.inputs


def test_layers_without_positions_take_no_rotary_table() -> None:
    outline = survey(SMOLLM3)
    assert layers(outline) == [[0, 2], [1, 3]]
    assert outline.blocks[0].inputs == ROTARY
    assert outline.blocks[1].inputs == {}


def test_dense_layers_among_experts_are_another_kind() -> None:
    outline = survey(QWEN3_MOE)
    assert layers(outline) == [[0, 2], [1]]
    experts, dense = outline.blocks
    assert "mlp.gate.weight" in experts.parameters
    assert "mlp.up_proj.weight" in dense.parameters
    assert not outline.parameters["model.layers.0.mlp.experts.gate_up_proj"].linear


def test_signatures_do_not_depend_on_the_number_of_layers() -> None:
    three, nine = llama(), survey({**LLAMA, "num_hidden_layers": 9})
    assert nine.blocks[0].layers == list(range(9))
    assert three.blocks[0].signature == nine.blocks[0].signature
    assert three.first_signature == nine.first_signature
    assert three.last_signature == nine.last_signature


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"rms_norm_eps": 1e-3}, {"block", "last"}),
        ({"intermediate_size": 128}, {"block"}),
        ({"rope_theta": 500.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"first"}),
        ({"vocab_size": 200}, {"first", "last"}),
        ({"hidden_act": "gelu"}, {"block"}),
        ({"initializer_range": 0.5, "bos_token_id": 3, "use_cache": False}, set()),
    ],
    ids=["norm", "mlp", "rotary", "vocabulary", "activation", "nothing"],
)
def test_a_signature_changes_with_what_the_program_computes(changes: dict[str, Any], differs: set[str]) -> None:
    one, other = llama(), survey({**LLAMA, **changes})
    found = {
        "first": one.first_signature != other.first_signature,
        "block": one.blocks[0].signature != other.blocks[0].signature,
        "last": one.last_signature != other.last_signature,
    }
    assert {name for name, changed in found.items() if changed} == differs


def test_keys_and_values_of_different_sizes() -> None:
    outline = survey(DEEPSEEK)
    assert layers(outline) == [[0], [1, 2]]
    assert [(block.cache_shape, block.value_size) for block in outline.blocks] == [([4, 16], 8)] * 2
    bias = outline.parameters["model.layers.1.mlp.gate.e_score_correction_bias"]  # a buffer, for transformers
    assert (bias.shape, bias.linear) == ([4], False)


def test_two_surveys_say_the_same() -> None:
    assert survey(GEMMA3) == survey(GEMMA3)


def test_random_weights_cover_what_the_outline_lists() -> None:
    outline = survey(QWEN3_MOE)
    assert RandomSource(outline.parameters, 0).names() == set(outline.parameters)


@pytest.mark.parametrize(
    ("hf_config", "message"),
    [
        ({"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 32}, "MambaForCausalLM .* state-space layers"),
        ({**SIZES, "model_type": "phimoe", "num_local_experts": 4, "rope_parameters": PHIMOE}, "the values of tensors"),
        ({"model_type": "t5"}, "cannot make a causal language model of type 't5'"),
        ({"model_type": "no_such_type"}, "'no_such_type' is not one that transformers knows"),
        ({}, "None is not one that transformers knows"),
        ({**LLAMA, "rope_parameters": {"rope_type": "no_such_rope", "rope_theta": 1.0}}, "no_such_rope"),
        ({**LLAMA, "hidden_act": "no_such_activation"}, "no_such_activation"),
    ],
    ids=["mamba", "phimoe", "t5", "unknown", "none", "rope", "activation"],
)
def test_what_cannot_be_built_is_refused_with_the_reason(hf_config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        survey(hf_config)


def test_planning_and_reading_outlines_import_nothing_heavy() -> None:
    """`models.survey` runs in a worker: the build's own process reads its result as data."""
    script = """
import sys
import furiosa_build.build.build, furiosa_build.ir.outline, furiosa_build.steps.survey, furiosa_build.steps.qualify
print({"torch", "transformers", "safetensors", "furiosa_build.models.analyze"} & set(sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "set()\n"
