"""A graph becomes a plan: lowered, matched with patterns, and then written down node by node in the graph's order."""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch.fx import Node

from furiosa_build.backends.graph import Graph, returned_nodes, user_inputs
from furiosa_build.backends.native.builder import refusal
from furiosa_build.backends.native.complex_numbers import as_real
from furiosa_build.backends.native.constants import fold
from furiosa_build.backends.native.emission import Emission, is_packed_input
from furiosa_build.backends.native.emit_operators import OPERATORS, is_read_of_slots
from furiosa_build.backends.native.emit_pointwise import emit_chain, find_chains
from furiosa_build.backends.native.emit_views import VIEWS
from furiosa_build.backends.native.fusion import find_fusions
from furiosa_build.backends.native.linear_pattern import find_products
from furiosa_build.backends.native.lowering import lower
from furiosa_build.backends.native.norm_pattern import find_norms
from furiosa_build.backends.native.opaque import paged_attention, write_kv_cache
from furiosa_build.backends.native.packing import is_packed
from furiosa_build.backends.native.plan import Plan
from furiosa_build.backends.native.rotary_pattern import find_rotaries
from furiosa_build.ir.tensors import Layout


def make_plan(graph: Graph) -> Plan:
    """The plan of a graph. Raises UserError for one that calls an operator that the library does not have."""
    program = lower(graph)
    inputs = user_inputs(program, [as_real(spec) for spec in graph.inputs])
    results = [as_real(spec) for spec in graph.outputs]
    outputs = list(zip(returned_nodes(program), results, strict=False))  # behind them: that caches are written
    constants, calls = fold(program)
    weights = {node for node, spec in inputs if is_packed_input(spec)}
    weights |= {node for node, tensor in constants.items() if is_packed(Layout.of(tensor))}
    finders = [find_norms, find_rotaries, lambda nodes, taken: find_products(nodes, taken, weights)]
    fusions = find_fusions(calls, finders)
    covered = {node for fusion in fusions.values() for node in fusion.nodes}
    chains = find_chains([node for node in calls if node not in covered])
    covered |= {node for chain in chains.values() for node in chain}
    _check_caches(calls, {node for node, spec in inputs if None in spec.shape})
    emission = Emission(inputs, outputs, constants, covered)
    for node in calls:
        if node in fusions:
            fusions[node].emit(emission)
        elif node in chains:
            emit_chain(emission, node, chains[node])
        elif node in covered:
            continue
        elif node.target in VIEWS:
            emission.define(node, VIEWS[node.target](emission, node))
        elif node.target in OPERATORS:
            OPERATORS[node.target](emission, node)
        else:
            raise refusal(str(node.target))
    emission.finish()
    return emission.builder.finish()


def _check_caches(calls: Sequence[Node], caches: Set[Node]) -> None:
    """Raises UserError where a KV cache is used but by attention and by slots: no plan knows how many it has."""
    for node in calls:
        if not caches.isdisjoint(node.all_input_nodes) and not _may_read_caches(node):
            raise refusal(f"{node.target} of a KV cache")


def _may_read_caches(node: Node) -> bool:
    return node.target in (paged_attention, write_kv_cache) or is_read_of_slots(node)
