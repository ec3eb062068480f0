"""RMS normalization, as models spell it: one call of `norm`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from furiosa_build.backends.native.emission import Emission
from furiosa_build.backends.native.expressions import dtype_of
from furiosa_build.backends.native.fusion import (
    Fusion,
    aten,
    is_call,
    is_plain_sum,
    only_user,
    other_operand,
    shape_of,
    used_within,
)


@dataclass(frozen=True)
class _RmsNorm:
    """x / sqrt(mean(x^2) + eps) * (weight + offset)."""

    x: Node
    eps: float
    weight: Node | None = None
    offset: float = 0.0
    rounds: bool = False

    def emit(self, emission: Emission, root: Node) -> None:
        x = emission.dense_rows(emission.value(self.x))
        weight = None if self.weight is None else emission.dense(emission.value(self.weight))
        operands = [x, None, weight, None, emission.out(root), None]
        emission.builder.call("norm", operands, [0, int(self.rounds)], [self.eps, self.offset])


def find_norms(nodes: Sequence[Node], taken: set[Node]) -> list[Fusion]:
    """The RMS normalizations of a graph."""
    del taken
    found = (_match(node) for node in nodes if is_call(node, aten.rsqrt.default))
    return [fusion for fusion in found if fusion is not None]


def _match(rsqrt: Node) -> Fusion | None:
    """rsqrt(mean(x^2) + eps) times x, and what follows: a conversion back, a weight, another conversion."""
    shifted: Any = rsqrt.args[0]
    if not is_plain_sum(shifted) or not isinstance(shifted.args[1], int | float):
        return None
    mean, eps = shifted.args
    if (
        not is_call(mean, aten.mean.dim)
        or len(mean.args) < 3
        or mean.args[1] not in ([-1], [mean.meta["val"].dim() - 1])
    ):
        return None
    square, scaled = mean.args[0], only_user(rsqrt)
    x = _root_of(square)
    if x is None or scaled is None or not is_call(scaled, aten.mul.Tensor) or other_operand(scaled, rsqrt) is not x:
        return None
    inner = {square, mean, shifted, rsqrt, scaled}
    if not used_within(inner - {scaled}, inner):
        return None
    source = _widened(x)
    if source is not x and used_within([x], inner):
        inner.add(x)
    return _extend(source, float(eps), scaled, inner)


def _extend(x: Node, eps: float, last: Node, nodes: set[Node]) -> Fusion:
    rounded, weight, offset = False, None, 0.0
    after = only_user(last)
    if after is not None and is_call(after, aten._to_copy.default) and dtype_of(after) == dtype_of(x):
        rounded, last = True, after
        nodes.add(after)
        after = only_user(last)
    if after is not None and is_call(after, aten.mul.Tensor):
        factor = other_operand(after, last)
        if isinstance(factor, Node) and shape_of(factor) == shape_of(x)[-1:]:
            weight, last = factor, after
            nodes.add(after)
            weight, offset = _weight(factor, nodes)
            after = only_user(last)
            if after is not None and is_call(after, aten._to_copy.default) and dtype_of(after).is_floating_point:
                last = after
                nodes.add(after)
    norm = _RmsNorm(x, eps, weight, offset, rounded and weight is not None)
    root = last
    return Fusion(root, frozenset(nodes), lambda emission: norm.emit(emission, root))


def _weight(factor: Node, nodes: set[Node]) -> tuple[Node, float]:
    """The parameter that a factor is made of, and what is added to it. Nodes that only this needs join the fusion."""
    offset = 0.0
    if is_plain_sum(factor):
        numbers = [a for a in factor.args if isinstance(a, int | float)]
        others = [a for a in factor.args if isinstance(a, Node)]
        if len(numbers) == len(others) == 1 and used_within([factor], nodes):
            nodes.add(factor)
            offset, factor = float(numbers[0]), others[0]
    source = _widened(factor)
    if source is not factor and used_within([factor], nodes):
        nodes.add(factor)
    return source, offset


def _root_of(square: Any) -> Node | None:
    """What a value is the square of."""
    if is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2:
        return square.args[0]  # type: ignore[no-any-return]
    if is_call(square, aten.mul.Tensor) and square.args[0] is square.args[1]:
        return square.args[0]  # type: ignore[no-any-return]
    return None


def _widened(node: Node) -> Node:
    """What a node is the float32 form of; itself if it is something else."""
    if is_call(node, aten._to_copy.default) and dtype_of(node) == torch.float32:
        source = node.args[0]
        if isinstance(source, Node) and dtype_of(source) in (torch.bfloat16, torch.float16):
            return source
    return node
