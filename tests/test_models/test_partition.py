"""A graph cut at its collectives: its parts, run for every rank with sums between them, are the whole function."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from furiosa_build.backends.graph import Graph
from furiosa_build.backends.graph_interpreter import GraphInterpreter
from furiosa_build.backends.ops import all_gather, all_reduce
from furiosa_build.models.graph_inputs import GraphInputs
from furiosa_build.models.partition import CutGraph


def run(graph: CutGraph, fed: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Every rank's tensors at the end; `fed` are those that it begins with."""
    tensors = [dict(own) for own in fed]
    for part, collectives in zip(graph.parts, graph.collectives, strict=True):
        module = GraphInterpreter(Graph(part))
        for own in tensors:
            outputs = module(*(own[spec.name] for spec in part.inputs))
            own.update(zip((spec.name for spec in part.outputs), outputs, strict=True))
        for found in collectives:
            parts = [own[found.source] for own in tensors]
            joined = torch.stack(parts).sum(0) if found.op == "all_reduce" else torch.cat(parts, -1)
            for own in tensors:
                own[found.result] = joined
    return tensors


def test_parts_and_sums_are_the_function() -> None:
    inputs = GraphInputs()
    for name in ("x", "w", "v"):
        inputs.add(name, "activation", (4, 4), torch.float32)

    def function(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        y = x.sin()
        h = y + all_reduce(x @ w)
        two = all_reduce(h @ v) * all_reduce(h.cos() @ w)  # side by side
        return two + h, y

    graph = inputs.export(function, ["result", "sine"])
    assert [len(collectives) for collectives in graph.collectives] == [1, 2, 0]
    x = torch.randn(4, 4)
    fed = [{"x": x, "w": torch.randn(4, 4), "v": torch.randn(4, 4)} for _ in range(3)]
    h = x.sin() + sum(x @ own["w"] for own in fed)
    expected = sum(h @ own["v"] for own in fed) * sum(h.cos() @ own["w"] for own in fed) + h
    for own in run(graph, fed):
        torch.testing.assert_close(own["result"], expected)
        torch.testing.assert_close(own["sine"], x.sin())


def test_a_collective_may_be_the_last_thing() -> None:
    inputs = GraphInputs()
    inputs.add("x", "activation", (2, 3), torch.float32)
    graph = inputs.export(lambda x: (all_gather(x.exp(), 2),), ["y"])
    assert len(graph.parts) == 1
    fed = [{"x": torch.randn(2, 3)} for _ in range(2)]
    for own in run(graph, fed):
        torch.testing.assert_close(own["y"], torch.cat([each["x"].exp() for each in fed], -1))


def test_without_collectives_there_is_one_part_with_its_outputs_in_order() -> None:
    inputs = GraphInputs()
    inputs.add("x", "activation", (3,), torch.float32)
    graph = inputs.export(lambda x: (x.sin().cos(), x.sin()), ["second", "first"]).whole
    assert [spec.name for spec in graph.outputs] == ["second", "first"]
    x = torch.randn(3)
    torch.testing.assert_close(GraphInterpreter(graph)(x), (x.sin().cos(), x.sin()))


def test_a_cut_graph_has_no_whole() -> None:
    inputs = GraphInputs()
    inputs.add("x", "activation", (2, 3), torch.float32)
    with pytest.raises(ValueError, match="too many values"):
        _ = inputs.export(lambda x: (all_reduce(x.exp()).sin(),), ["y"]).whole


def test_collectives_run_nowhere_but_between_parts() -> None:
    with pytest.raises(NotImplementedError, match="cut here"):
        all_reduce(torch.zeros(1))
