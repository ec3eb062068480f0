from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models.tiny import GEMMA3, LLAMA, MISTRAL, MODELS, load, save_random_model
from torch import Tensor

from furiosa_build.backends.graph import Graph
from furiosa_build.backends.graph_interpreter import GraphInterpreter
from furiosa_build.build.build import Build
from furiosa_build.ir.segment import Segment
from furiosa_build.models.partition import CutGraph

from .requests import job

StartBuild = Callable[..., Build]


@pytest.fixture
def traced(tmp_path: Path) -> Callable[..., Graph]:
    """The graph that the step makes of a request."""

    def run(build: Build, step: str, **changes: Any) -> Graph:
        job(build, step).changed(**changes).run(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["graphs.json"]
        return CutGraph.model_validate_json((tmp_path / "graphs.json").read_bytes()).whole

    return run


def shapes(graph: Graph, role: str) -> dict[str, list[int | None]]:
    return {spec.name: spec.shape for spec in graph.inputs if spec.role == role}


def test_a_first_supertask_makes_hidden_states_and_rotary_tables(
    start_build: StartBuild, traced: Callable[..., Graph]
) -> None:
    graph = traced(start_build(GEMMA3), "partition:prefill-2x64:first")
    assert shapes(graph, "activation") == {"input_ids": [2, 64], "position_ids": [2, 64]}
    assert shapes(graph, "parameter") == {"model.embed_tokens.weight": [192, 64]}
    tables = [f"layers.{layer}.position_embeddings.{i}" for layer in (0, 2) for i in (0, 1)]
    assert [spec.name for spec in graph.outputs] == ["hidden_states", *tables]
    assert [spec.shape for spec in graph.outputs] == [[2, 64, 64], *[[2, 64, 16]] * 4]


def test_a_decode_block_reads_its_context_from_slots(start_build: StartBuild, traced: Callable[..., Graph]) -> None:
    graph = traced(start_build(LLAMA), "partition:decode-4x128:block")
    activations = shapes(graph, "activation")
    assert activations["hidden_states"] == [4, 1, 64]
    assert activations["slot_mapping"] == [4, 1]
    assert activations["context_slots"] == [4, 128]
    assert activations["context_lens"] == [4]
    # The number of slots is free: neither block size nor number of blocks shapes a program.
    assert shapes(graph, "kv_cache") == {"key_cache": [None, 2, 16], "value_cache": [None, 2, 16]}
    assert shapes(graph, "parameter")["self_attn.k_proj.weight"] == [32, 64]
    assert [(spec.name, spec.shape) for spec in graph.outputs] == [("hidden_states", [4, 1, 64])]


def test_a_prefill_block_needs_no_context(start_build: StartBuild, traced: Callable[..., Graph]) -> None:
    activations = shapes(traced(start_build(LLAMA), "partition:prefill-2x64:block"), "activation")
    assert activations["hidden_states"] == [2, 64, 64]
    assert not {"context_slots", "context_lens"} & set(activations)


@pytest.mark.parametrize(
    ("step", "last_only", "rows"),
    [
        ("partition:prefill-2x64:last", False, 64),
        ("partition:prefill-2x64:last", True, 1),
        ("partition:decode-4x128:last", True, 1),
    ],
)
def test_a_last_supertask_gives_all_logits_or_those_of_the_last_token(
    step: str, last_only: bool, rows: int, start_build: StartBuild, traced: Callable[..., Graph]
) -> None:
    graph = traced(start_build(LLAMA, calculate_logit_only_for_last_token=last_only), step)
    (logits,) = graph.outputs
    assert logits.shape[1:] == [rows, 192]
    selects = last_only and "prefill" in step
    assert ("logits_indices" in shapes(graph, "activation")) == selects
    assert set(shapes(graph, "parameter")) == {"lm_head.weight", "model.norm.weight"}


def test_layers_of_one_kind_trace_to_the_same_bytes(start_build: StartBuild, traced: Callable[..., Graph]) -> None:
    build = start_build(LLAMA)
    segments = (Segment(layers=(layer,)) for layer in (0, 2))
    first, third = (traced(build, "partition:decode-1x64:block", segment=segment).to_json() for segment in segments)
    assert first == third


def test_no_weight_is_in_a_graph(start_build: StartBuild, traced: Callable[..., Graph]) -> None:
    """Only what transformers computes from the configuration, the rotary frequencies, is."""
    for kind, largest in (("first", 16 // 2 * 4), ("block", 0), ("last", 0)):
        graph = traced(start_build(LLAMA), f"partition:prefill-1x32:{kind}")
        assert sum(len(constant.data) for constant in graph.data.constants) <= 2 * largest


@pytest.mark.parametrize(
    ("scheme", "name", "dtype"), [("fp8", "weight", "float8_e4m3fn"), ("int8", "weight_packed", "uint8")]
)
def test_quantized_weights_are_inputs_as_they_are_stored(
    scheme: str, name: str, dtype: str, start_build: StartBuild, traced: Callable[..., Graph]
) -> None:
    graph = traced(start_build(LLAMA, scheme=scheme), "partition:decode-1x64:block")
    found = {spec.name: (spec.dtype, spec.shape) for spec in graph.inputs if spec.role == "parameter"}
    assert found[f"mlp.up_proj.{name}"] == (dtype, [96, 64])
    assert found["mlp.up_proj.weight_scale"] == ("float32", [96, 1])
    assert found["input_layernorm.weight"] == ("float32", [64])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("models")
    return cache(lambda name: save_random_model(MODELS[name], root / name))


@pytest.mark.parametrize("hf_config", [LLAMA, MISTRAL, GEMMA3], ids=lambda config: config["model_type"])
def test_the_supertasks_one_after_another_are_the_model(
    hf_config: dict[str, Any], saved: Callable[[str], Path], start_build: StartBuild, traced: Callable[..., Graph]
) -> None:
    """A prefill of one full bucket by hand, without the runtime: what the graphs say is what transformers computes."""
    name = {"gemma3_text": "gemma3"}.get(hf_config["model_type"], hf_config["model_type"])
    build, model = start_build(saved(name)), load(saved(name))
    ids = torch.randint(0, 192, (1, 32), generator=torch.Generator().manual_seed(2))
    tensors: dict[str, Tensor] = {
        "input_ids": ids,
        "position_ids": torch.arange(32)[None],
        "slot_mapping": torch.randperm(40, generator=torch.Generator().manual_seed(3))[:32][None],
    }
    parameters = dict(model.named_parameters())

    def run(graph: Graph, sources: Mapping[str, str], prefix: str) -> None:
        inputs = []
        for spec in graph.inputs:
            if spec.role == "activation":
                inputs.append(tensors[sources.get(spec.name, spec.name)])
            elif spec.role == "parameter":
                inputs.append(parameters[prefix + spec.name].detach())
            else:
                inputs.append(torch.zeros([40 if size is None else size for size in spec.shape]))
        outputs = GraphInterpreter(graph)(*inputs)
        tensors.update(zip([spec.name for spec in graph.outputs], outputs, strict=True))

    bucket = "partition:prefill-1x32"
    run(traced(build, f"{bucket}:first"), {}, "")
    kinds = next(iter(build.plan.model.kinds.values()))
    for layer in range(hf_config["num_hidden_layers"]):
        kind = next(kind for kind in kinds if layer in kind.layers)
        run(traced(build, f"{bucket}:{kind.name}"), kind.sources, f"model.layers.{layer}.")
    run(traced(build, f"{bucket}:last"), {}, "")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    # float32 in another order of summing, see test_against_transformers.
    torch.testing.assert_close(tensors["logits"], expected, rtol=1e-4, atol=1e-4)
