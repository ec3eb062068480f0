"""Lowering: a graph whose calls of some operators are replaced by what a function of tensors traces to.

It is part of compiling, not of tracing: all backends take the same graphs, and a change to a backend's formulation of
an operator traces nothing again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import ExportedProgram

from furiosa_build.backends.core_aten import decompose
from furiosa_build.backends.graph import Graph, export_module
from furiosa_build.backends.graph_interpreter import GraphInterpreter

Lowerings = Mapping[str, Callable[..., Any]]
"""Operator, as a graph names it (`furiosa.paged_attention.default`) -> a function of the same arguments."""


def export(graph: Graph, lowerings: Lowerings) -> tuple[ExportedProgram, tuple[torch.Tensor, ...]]:
    """The lowered graph as an exported program, with the fake inputs used; free dimensions stay free."""
    return export_module(GraphInterpreter(graph, lowerings), graph.inputs)


def lower_to_core_aten(graph: Graph, lowerings: Lowerings) -> Graph:
    """The lowered graph in operators of core ATen only, and writes of KV caches in place.

    Raises ValueError when an operator is left that does not decompose.
    """
    program, _ = export(graph, lowerings)
    outputs = [spec.name for spec in graph.outputs]
    return Graph.from_exported(decompose(program), graph.inputs, outputs, keeps_inputs=True)
