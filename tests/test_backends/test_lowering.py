"""A trace has an operator where a backend may choose the formulation; compiling replaces it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from grid import grid

from furiosa_build.backends import ops
from furiosa_build.backends.core_aten import is_core
from furiosa_build.backends.cpu_lowerings import CORE_ATEN_LOWERINGS, LOWERINGS
from furiosa_build.backends.eager import EagerBackend
from furiosa_build.backends.graph import Graph
from furiosa_build.backends.graph_interpreter import GraphInterpreter
from furiosa_build.backends.lowering import Lowerings, export, lower_to_core_aten
from furiosa_build.ir.segment import Segment
from furiosa_build.models.tracing import BucketShape, Tracer
from furiosa_build.plan.source_code import SourceCode

LAYERS = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "dtype": "float32",
}
SHAPES = {
    "prefill": BucketShape(2, 16, 16),
    "append": BucketShape(2, 4, 16),
    "decode": BucketShape(2, 1, 16),
}


VARIANTS = {
    "softcap and window": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 8},
    "sinks and window": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
    "values smaller than keys": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "head_dim": 8,
        **{"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
        "first_k_dense_replace": 2,
    },
}


@pytest.fixture(scope="module", params=SHAPES)
def graph(request: pytest.FixtureRequest) -> Graph:
    """Two layers in one graph."""
    return Tracer(LAYERS, {}).trace(SHAPES[request.param], Segment(layers=(0, 1))).whole


def own_operators(graph: Graph) -> list[str]:
    return [call.op for call in graph.data.nodes if not call.op.startswith(("aten.", "operator."))]


def inputs_of(graph: Graph) -> list[torch.Tensor]:
    """Random numbers; two sequences of 16 tokens, one behind the other in the cache."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.arange(32).reshape(2, 16)
    query = next(spec.shape[1] for spec in graph.inputs if spec.name == "slot_mapping")
    fixed = {
        "slot_mapping": slots[:, -(query or 0) :].contiguous(),
        "context_slots": slots,
        "context_lens": torch.tensor([16, 16]),
        "position_ids": torch.arange(16 - (query or 0), 16).expand(2, -1).contiguous(),
    }
    return [
        fixed[spec.name]
        if spec.name in fixed
        else torch.randn([32 if size is None else size for size in spec.shape], generator=generator) / 4
        for spec in graph.inputs
    ]


def test_a_layer_is_traced_with_one_attention(graph: Graph) -> None:
    assert own_operators(graph) == [ops.PAGED_ATTENTION] * 2


def test_a_layer_for_one_token_writes_the_keys_and_values_of_all() -> None:
    segment = Segment(first=True, layers=(0, 1), last=True, slices=True)
    graph = Tracer(LAYERS, {}).trace(BucketShape(2, 16, 16), segment, last_token_only=True).whole
    assert own_operators(graph) == [ops.PAGED_ATTENTION, ops.WRITE_KV_CACHE, ops.PAGED_ATTENTION]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", grid(SHAPES, ["append"]))
def test_variants_of_attention_lower_to_the_same(variant: str, shape: str) -> None:
    graph = Tracer({**LAYERS, **VARIANTS[variant]}, {}).trace(SHAPES[shape], Segment(layers=(0,))).whole
    assert own_operators(graph) == [ops.PAGED_ATTENTION]
    [expected] = GraphInterpreter(graph)(*inputs_of(graph))
    for lowerings in (LOWERINGS, CORE_ATEN_LOWERINGS):
        program, _ = export(graph, lowerings)
        torch.testing.assert_close(program.module()(*inputs_of(graph))[0], expected, rtol=1e-4, atol=1e-5)
    lowered = lower_to_core_aten(graph, CORE_ATEN_LOWERINGS)
    assert own_operators(lowered) == []
    torch.testing.assert_close(GraphInterpreter(lowered)(*inputs_of(graph))[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowerings", [LOWERINGS, ops.REFERENCES], ids=["inductor", "references"])
@pytest.mark.parametrize("core_aten", [False, True])
def test_a_lowered_graph_computes_the_same_in_operators_of_aten(
    graph: Graph, lowerings: Lowerings, core_aten: bool
) -> None:
    given, expected_given = inputs_of(graph), inputs_of(graph)
    [expected] = GraphInterpreter(graph)(*expected_given)
    if core_aten:
        lowered = lower_to_core_aten(graph, lowerings)
        assert own_operators(lowered) == []
        assert lowered.inputs == graph.inputs
        assert lowered.outputs == graph.outputs
        [found] = GraphInterpreter(lowered)(*given)
    else:
        program, _ = export(graph, lowerings)
        called = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        assert {target.namespace for target in called} == {"aten"}
        [found] = program.module()(*given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for spec, one, other in zip(graph.inputs, given, expected_given, strict=True):
        if spec.role == "kv_cache":
            assert not other.equal(inputs_of(graph)[graph.inputs.index(spec)]), "nothing is written"
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_eager_program_has_the_operator_or_core_aten_only(graph: Graph, tmp_path: Path) -> None:
    for core_aten in (False, True):
        program = tmp_path / f"{core_aten}.json"
        EagerBackend().compile(graph, program, "any", tmp_path, core_aten=core_aten)
        found = Graph.from_json(program.read_bytes())
        if core_aten:
            calls = [call.op.split(".") for call in found.data.nodes if call.op.startswith("aten.")]
            assert all(is_core(getattr(getattr(torch.ops.aten, name), overload)) for _, name, overload in calls)
        assert own_operators(found) == ([] if core_aten else [ops.PAGED_ATTENTION] * 2)


def test_tracing_knows_no_backend() -> None:
    """So a formulation is in the key of compile, and never in that of trace."""
    code = SourceCode()
    traced = code.imported_modules(("furiosa_build.steps.trace", "furiosa_build.steps.survey"))
    assert {name for name in traced if name.startswith("furiosa_build.backends.")} == {
        "furiosa_build.backends.graph",
        "furiosa_build.backends.ops",
    }
    compiled = code.imported_modules(("furiosa_build.backends.inductor.backend",))
    assert "furiosa_build.backends.grouped_attention" in compiled
