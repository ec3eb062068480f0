"""Whole models as plans give what the eager backend gives; what the layers of a model become is a few calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from grid import grid

from furiosa_build.backends.graph import Graph
from furiosa_build.backends.native.emit import make_plan
from furiosa_build.core.errors import UserError

from ..small_graph import small_graph
from .graphs import BUCKETS, assert_equal_to_eager, graph_of, make_inputs, model, run_plan, trace

EXPERTS: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
}
LATENT: dict[str, Any] = {
    **EXPERTS,
    **{"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    **{"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 8, "head_dim": 8},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {"partial_rotary_factor": 0.5},
    "gpt2": {},
    "gpt_neox": {},
    "olmo": {},
    "olmo2": {},
    "cohere": {},
    "glm": {"head_dim": 16},
    "granite": {},
    "opt": {},
    "stablelm": {},
    "nemotron": {},
    "bloom": {},
    "mpt": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "falcon, groups": {"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "xglm": {"ffn_dim": 96},
    "gpt_neox_japanese": {},
    "mixtral": EXPERTS,
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "olmoe": {**EXPERTS, "eos_token_id": 1},
    "granitemoe": EXPERTS,
    "phimoe": EXPERTS,
    "gpt_oss": {**EXPERTS, "head_dim": 16, "sliding_window": 8},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
}


@pytest.fixture(scope="module")
def llama() -> Graph:
    return trace(model("llama"), BUCKETS["decode"])


@pytest.mark.parametrize("name", grid(MODELS, ["llama", "gemma2", "falcon, groups", "deepseek_v3"]))
@pytest.mark.parametrize("bucket", grid(BUCKETS, ["decode"]))
def test_models_give_what_the_eager_backend_gives(name: str, bucket: str, library_file: Path) -> None:
    graph = trace(model(**{"model_type": name, **MODELS[name]}), BUCKETS[bucket])
    assert_equal_to_eager(graph, make_inputs(graph, BUCKETS[bucket]), library_file)


@pytest.mark.parametrize("dtype", grid(["bfloat16", "float16"], ["bfloat16"]))
@pytest.mark.parametrize(
    "scheme", grid(["none", "int8", "fp8", "int8-plain-dynamic", "fp8-dynamic", "int8-tensor"], ["int8-plain-dynamic"])
)
def test_schemes_and_dtypes_give_what_the_eager_backend_gives(dtype: str, scheme: str, library_file: Path) -> None:
    """Up to rounding: the eager backend rounds between operators that are one call here."""
    graph = trace(model("llama", dtype=dtype), BUCKETS["append"], scheme)
    assert_equal_to_eager(graph, make_inputs(graph, BUCKETS["append"]), library_file, tolerance=0.05)


def test_a_layer_is_a_few_calls(llama: Graph) -> None:
    ops = [call.op for call in make_plan(llama).calls]
    attention = ["write_kv_cache", "paged_attention", "join_attention"]
    layer = ["norm", "linear", "rotary", "rotary", *attention, "linear", "norm", "linear", "pointwise", "linear"]
    assert ops[-2 * len(layer) - 2 :] == [*layer, *layer, "norm", "linear"]


def test_two_plans_of_a_graph_are_the_same_bytes(llama: Graph) -> None:
    assert make_plan(llama).to_json() == make_plan(llama).to_json()


def test_what_programs_compute_does_not_depend_on_the_threads(llama: Graph, library_file: Path) -> None:
    plan, inputs = make_plan(llama), make_inputs(llama, BUCKETS["decode"])
    one, other = (run_plan(plan, library_file, llama, inputs, concurrency)[0] for concurrency in (1, 2))
    assert one.equal(other)


def test_an_operator_that_the_library_lacks_is_refused_by_name() -> None:
    graph = graph_of(lambda x: (torch.cumsum(x, 0),), [torch.ones(4)])
    with pytest.raises(UserError, match=r"backend native has no kernel for aten\.cumsum\.default") as error:
        make_plan(graph)
    assert error.value.hint == "build with backend=inductor"


def test_a_cache_that_is_read_apart_from_attention_is_refused() -> None:
    with pytest.raises(UserError, match=r"no kernel for aten\.index\S* of a KV cache"):
        make_plan(small_graph())


def test_parameters_that_are_constants_are_packed_by_the_compiler(library_file: Path) -> None:
    x, weight = torch.randn(3, 8), torch.randn(40, 8)
    graph = graph_of(lambda x, w: (x @ w.T, torch.nn.functional.linear(x, w)), [x, weight], parameters=1)
    assert_equal_to_eager(graph.embed({1: weight}), [x], library_file)


def test_a_packed_parameter_that_is_no_weight_is_unpacked(library_file: Path) -> None:
    x, weight = torch.randn(3, 8), torch.randn(3, 8)
    plan = assert_equal_to_eager(graph_of(lambda x, w: (x * w,), [x, weight], parameters=1), [x, weight], library_file)
    assert [call.op for call in plan.calls] == ["unpack", "pointwise"]
