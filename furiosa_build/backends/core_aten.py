"""An exported program in operators of core ATen, the set that PyTorch promises to compilers.

https://docs.pytorch.org/docs/stable/torch.compiler_ir.html lists it. The one exception is `index_put_`: a KV cache is
written in place, and a copy of it for each step would cost more than the step.
"""

from __future__ import annotations

import warnings

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import Node

from furiosa_build.backends.graph import live_nodes

_IN_PLACE = {torch.ops.aten.index_put.default: torch.ops.aten.index_put_.default}


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Decomposes every operator; inputs that the program writes are written in place as before.

    Raises ValueError when an operator is left that is not of the set.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        written: ExportedProgram = program.run_decompositions()
    nodes = {node.name: node for node in written.graph.nodes}
    outputs = []
    for spec in written.graph_signature.output_specs:
        node = nodes[spec.arg.name]
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            assert spec.target is not None
            _write_in_place(node, nodes[spec.target])
        else:
            outputs.append(node)
    [end] = [node for node in written.graph.nodes if node.op == "output"]
    end.args = (tuple(outputs),)
    for node in live_nodes(written):
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and not is_core(target):
            raise ValueError(f"{target} does not decompose into operators of core ATen")
    return written


def is_core(target: torch._ops.OpOverload) -> bool:
    """Whether an operator may be in a decomposed graph: of core ATen, or the write of a cache."""
    return torch.Tag.core in target.tags or target in _IN_PLACE.values()


def _write_in_place(value: Node, cache: Node) -> None:
    """`value` is what becomes of `cache`: a chain of writes, each of which begins with the one before."""
    node = value
    while node is not cache:
        if node.target not in _IN_PLACE:
            raise ValueError(f"a cache is written by {node.target}, which has no form that writes in place")
        before = node.args[0]
        assert isinstance(before, Node)
        node.target = _IN_PLACE[node.target]
        node.replace_all_uses_with(cache)
        node.args = (cache, *node.args[1:])
        node = before
