"""Lowering: a graph as torch.fx nodes, in core ATen and the operators that this backend computes as they are."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.export import ExportedProgram, default_decompositions

from furiosa_build.backends import ops
from furiosa_build.backends.graph import Graph, export_module, live_nodes
from furiosa_build.backends.graph_interpreter import GraphInterpreter
from furiosa_build.backends.native.complex_numbers import MAKES_COMPLEX, Complex, as_real, is_complex
from furiosa_build.backends.native.opaque import paged_attention, write_kv_cache

aten = torch.ops.aten
_KEPT = (aten.linear.default, aten.silu.default)
"""Operators that would decompose, and that the library computes better whole."""
_DIVIDED = (aten.addmm.default, aten.baddbmm.default, aten.elu.default, aten.hardtanh.default)
"""Operators of core ATen that are several of the library's."""


def lower(graph: Graph) -> ExportedProgram:
    """The graph's outputs come first among the program's; behind them is one for each call that only writes caches."""
    program, _ = export_module(_Lowered(graph), [as_real(spec) for spec in graph.inputs])
    table = dict(default_decompositions())
    for operator in _KEPT:
        table.pop(operator, None)
    table.update(get_decompositions(_DIVIDED))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        lowered: ExportedProgram = program.run_decompositions(table)
    live = live_nodes(lowered)
    for node in reversed(lowered.graph.nodes):
        if node.op == "call_function" and node not in live:  # such as checks that only repeat what the types say
            lowered.graph.erase_node(node)
    return lowered


class _Lowered(GraphInterpreter):
    """The graph with operators that write caches as ones that write nothing, as far as torch knows.

    So it need not make them functional. Their order is that of the graph: nothing between here and the plan changes it.
    """

    def __init__(self, graph: Graph) -> None:
        own: dict[str, Any] = {ops.PAGED_ATTENTION: paged_attention, ops.WRITE_KV_CACHE: self._write_kv_cache}
        super().__init__(graph, {**own, **MAKES_COMPLEX})
        self._is_complex = [is_complex(spec) for spec in graph.inputs]
        self._written: list[Tensor] = []

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given: list[Any] = [Complex(x) if pair else x for x, pair in zip(inputs, self._is_complex, strict=True)]
        outputs = [x.parts if isinstance(x, Complex) else x for x in super().forward(*given)]
        written, self._written = self._written, []  # torch takes a tensor that stays for a mistake
        return (*outputs, *written)

    def _write_kv_cache(self, *arguments: Any) -> None:
        self._written.append(write_kv_cache(*arguments))
