"""A traced graph cut at its collective operations: programs run between them, on every rank the same.

A rank computes partial results; `all_reduce` and `all_gather` join them. They are operators in a trace, and no backend
ever sees them: the runtime's communicator does what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch.export import ExportedProgram
from torch.fx import Node

from furiosa_build.backends.graph import Graph, dtype_name, live_nodes, returned_nodes, user_inputs, written_arguments
from furiosa_build.backends.ops import COLLECTIVES
from furiosa_build.ir.graph import GraphData
from furiosa_build.ir.tensors import TensorSpec


class Collective(BaseModel):
    """What joins `source`, which every rank has a part of, into `result`, which all have then."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    op: Literal["all_reduce", "all_gather"]
    source: str
    result: str


class CutGraph(BaseModel):
    """Graphs in the order in which they run, and the collectives that follow each of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    parts: list[GraphData]
    collectives: list[list[Collective]]

    @property
    def graphs(self) -> list[Graph]:
        return [Graph(part) for part in self.parts]

    @property
    def whole(self) -> Graph:
        """The graph, of which there is only one when nothing is cut."""
        [graph] = self.graphs
        return graph


def cut(program: ExportedProgram, inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> CutGraph:
    """Cuts an exported program whose user inputs are `inputs`, in order, and whose results are called `outputs`.

    A call belongs to the first part in which all that it needs is known: collectives that do not depend on each other
    follow the same part.
    """
    _drop_conversions_to_the_same(program)
    live = live_nodes(program)
    calls = [node for node in program.graph.nodes if node.op == "call_function" and node in live]
    level = _levels(calls)
    results = dict(zip(returned_nodes(program), outputs, strict=True))
    if len(results) < len(outputs):
        raise ValueError(f"one tensor is returned under two of the names {list(outputs)}")
    own = user_inputs(program, inputs)

    names: dict[Node, str] = dict(results)
    parts: list[GraphData] = []
    collectives: list[list[Collective]] = []
    for number in range(1 + max(level.values(), default=0)):
        inside = [node for node in calls if level[node] == number and node.target not in COLLECTIVES]
        joined = [node for node in calls if level[node] == number and node.target in COLLECTIVES]
        later = {user for node in inside for user in node.users if level.get(user, 0) > number} | set(joined)
        returned = [node for node in results if node in inside]  # in the order of `outputs`
        leaving = returned + [n for n in inside if n not in results and not later.isdisjoint(n.users)]
        if number == 0:  # what is returned as it came
            leaving += [node for node in results if node.op == "placeholder"]
        for i, node in enumerate(leaving):
            names.setdefault(node, f"part.{number}.{i}")
        for i, node in enumerate(joined):
            names.setdefault(node, f"joined.{number}.{i}")
        earlier = [(node, _spec(name, node)) for node, name in names.items() if level.get(node, number) < number]
        if leaving:
            graph = Graph.from_nodes(program, [*own, *earlier], inside, leaving, [names[node] for node in leaving])
            parts.append(graph.data)
            collectives.append([])
        if joined:
            collectives[-1] += [
                Collective(op=COLLECTIVES[node.target], source=names[node.args[0]], result=names[node])
                for node in joined
            ]
    return CutGraph(parts=parts, collectives=collectives)


def _levels(calls: Sequence[Node]) -> dict[Node, int]:
    level: dict[Node, int] = {}
    touched: dict[Node, int] = {}
    for node in calls:
        needed = [level[n] + (n.target in COLLECTIVES) for n in node.all_input_nodes if n in level]
        # A cache is written and read in the order of the trace.
        needed += [touched.get(n, 0) for n in node.all_input_nodes if n.op == "placeholder" and _is_written(n)]
        level[node] = max(needed, default=0)
        for n in node.all_input_nodes:
            if n.op == "placeholder":
                touched[n] = max(level[node], touched.get(n, 0))
    return level


def _is_written(node: Node) -> bool:
    return any(node in written_arguments(user) for user in node.users)


def _drop_conversions_to_the_same(program: ExportedProgram) -> None:
    """Removes conversions to a tensor's own dtype, which would be parts of their own behind a collective."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.to.dtype and node.args[0].meta["val"].dtype == node.meta["val"].dtype:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)


def _spec(name: str, node: Node) -> TensorSpec:
    value = node.meta["val"]
    return TensorSpec(name=name, role="activation", dtype=dtype_name(value.dtype), shape=list(value.shape))
