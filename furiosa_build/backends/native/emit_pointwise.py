"""Calls of operator `pointwise`: chains of ATen's operators, each as one call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch.fx import Node

from furiosa_build.backends.native.assembler import Assembler, Register, RegistersExhaustedError
from furiosa_build.backends.native.builder import refusal
from furiosa_build.backends.native.emission import Emission
from furiosa_build.backends.native.expressions import EXPRESSIONS, kind_of
from furiosa_build.backends.native.fusion import shape_of
from furiosa_build.backends.native.pointwise import MOST_TENSORS
from furiosa_build.backends.native.values import Value


def find_chains(nodes: Sequence[Node]) -> dict[Node, list[Node]]:
    """The pointwise nodes of a graph, in chains: the last node of each, and all of it in order.

    A node belongs to the chain of its users where that is one, and all of it has one shape: then what it computes never
    lies in memory.
    """
    root_of: dict[Node, Node] = {}
    found: dict[Node, list[Node]] = {}
    for node in reversed([node for node in nodes if node.target in EXPRESSIONS]):
        roots = {root_of.get(user) for user in node.users}
        root = roots.pop() if len(roots) == 1 else None
        if root is None or shape_of(root) != shape_of(node):
            root = node
        root_of[node] = root
        found.setdefault(root, []).insert(0, node)
    return found


def emit_chain(emission: Emission, root: Node, chain: Sequence[Node]) -> None:
    """A chain as one call, or where it needs too many registers or tensors, as one for each node."""
    try:
        _emit(emission, root, chain)
    except RegistersExhaustedError:
        for node in chain:
            _emit(emission, node, [node])


def emit_sum(emission: Emission, left: Value, right: Value) -> Value:
    """The sum of two floating-point values, of the shape and dtype of the first."""
    to = Assembler()
    result = emission.builder.new(left.shape, left.dtype)
    _call(emission, to, to.emit("add", to.load(1, "f"), to.load(2, "f")), [result, left, right.expand(left.shape)])
    return result


def emit_row_numbers(emission: Emission, indices: Sequence[Value], sizes: Sequence[int]) -> Value:
    """The numbers of the rows that indices of the leading dimensions stand for; negative ones count from the end."""
    to = Assembler()
    row: Register | None = None
    for number, size in enumerate(sizes):
        index = to.load(number + 1, "i")
        index = to.emit("where_int", to.emit("lt_int", index, 0), to.emit("add_int", index, size), index)
        row = index if row is None else to.emit("add_int", to.emit("mul_int", row, size), index)
    assert row is not None
    rows = emission.builder.new(indices[0].shape, "int64")
    _call(emission, to, row, [rows, *indices])
    return rows


def _emit(emission: Emission, root: Node, chain: Collection[Node]) -> None:
    to = Assembler()
    inputs: dict[Node, Value] = {}
    written: dict[Node, Register] = {}

    def argument(given: Any) -> Any:
        if not isinstance(given, Node):
            return given
        if given in written:
            return written[given]
        constant = emission.constant(given)
        if constant is not None and constant.numel() == 1:
            return constant.item()
        if given not in inputs:
            inputs[given] = emission.value(given).expand(shape_of(root))
        return to.load(1 + list(inputs).index(given), kind_of(given))

    for node in chain:
        if any(isinstance(given, Node) for given in node.kwargs.values()):
            raise refusal(f"{node.target} with tensors by name")
        written[node] = EXPRESSIONS[node.target](to, node, [argument(given) for given in node.args])
    if len(inputs) >= MOST_TENSORS:
        raise RegistersExhaustedError
    _call(emission, to, written[root], inputs.values(), root)


def _call(
    emission: Emission, to: Assembler, result: Register, operands: Collection[Value], root: Node | None = None
) -> None:
    """The call of a program. The output of that of a node goes where the node's tensor belongs."""
    code, constants = to.finish(result)
    outs = [] if root is None else [emission.out(root)]
    emission.builder.call("pointwise", [*outs, *operands], [1, *code], constants)
