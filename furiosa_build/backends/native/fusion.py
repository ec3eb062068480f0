"""Fusions: nodes of a lowered graph that are computed by one call, and what patterns need to find them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from furiosa_build.backends.native.emission import Emission

aten = torch.ops.aten


@dataclass(frozen=True)
class Fusion:
    """Nodes that are computed together.

    Attributes:
        root: Where it happens: all that they need is there before this node, and all that needs them comes after it.
        nodes: What is not computed on its own.
        emit: Appends the calls.
    """

    root: Node
    nodes: frozenset[Node]
    emit: Callable[[Emission], None]


def is_call(value: Any, *targets: Any) -> bool:
    """Whether a value is a call of one of these operators."""
    return isinstance(value, Node) and value.op == "call_function" and value.target in targets


def only_user(node: Node) -> Node | None:
    """The only node that uses this one; None if there are more, or the program's output does."""
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of a node's tensor."""
    return tuple(node.meta["val"].shape)


def other_operand(node: Node, one: Node) -> Any:
    """The operand of a call of two operands beside `one`; None if `one` is both."""
    left, right = node.args[:2]
    return (right if left is one else left) if (left is one) != (right is one) else None


def is_plain_sum(node: Any) -> bool:
    """Whether a value is the sum of two operands as they are."""
    return is_call(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1


def used_within(nodes: Iterable[Node], fusion: set[Node]) -> bool:
    """Whether nothing outside of a fusion uses these nodes."""
    return all(set(node.users) <= fusion for node in nodes)


def find_fusions(
    nodes: Sequence[Node], finders: Sequence[Callable[[Sequence[Node], set[Node]], list[Fusion]]]
) -> dict[Node, Fusion]:
    """The fusions of a graph by their roots. Each finder is given all nodes and those that are taken already."""
    taken: set[Node] = set()
    found: dict[Node, Fusion] = {}
    for finder in finders:
        for fusion in finder(nodes, taken):
            found[fusion.root] = fusion
            taken |= fusion.nodes
    return found
