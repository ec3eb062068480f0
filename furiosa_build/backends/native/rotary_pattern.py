"""Rotary embedding, as models spell it: one call of `rotary`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.fx import Node

from furiosa_build.backends.native.emission import Emission
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

_HALVES, _PAIRS = 0, 1


class _Rotated(NamedTuple):
    """x with its numbers exchanged, half of them negated: by halves, or by pairs that lie side by side."""

    x: Node
    kind: int
    nodes: set[Node]


class _Part(NamedTuple):
    """A slice of the last dimension."""

    x: Node
    begin: int
    end: int
    step: int


def find_rotaries(nodes: Sequence[Node], taken: set[Node]) -> list[Fusion]:
    """The rotary embeddings of a graph: x * cos + rotated(x) * sin."""
    del taken
    found = (_match(node) for node in nodes if is_plain_sum(node))
    return [fusion for fusion in found if fusion is not None]


def _match(root: Node) -> Fusion | None:
    for plain, turned in (root.args[:2], root.args[1::-1]):
        if not is_call(plain, aten.mul.Tensor) or not is_call(turned, aten.mul.Tensor):
            return None
        for exchanged, sin in (turned.args[:2], turned.args[1::-1]):  # type: ignore[union-attr]
            rotated = _rotated(exchanged)
            if rotated is None:
                continue
            cos = other_operand(plain, rotated.x)  # type: ignore[arg-type]
            nodes = {root, plain, turned, *rotated.nodes}
            if isinstance(cos, Node) and isinstance(sin, Node) and used_within(nodes - {root}, nodes):  # type: ignore[arg-type]
                return _fusion(root, rotated, cos, sin, nodes)  # type: ignore[arg-type]
    return None


def _fusion(root: Node, rotated: _Rotated, cos: Node, sin: Node, nodes: set[Node]) -> Fusion:
    x, size = rotated.x, shape_of(rotated.x)
    whole = _with_the_rest(root, x)
    if whole is not None:
        x, root = whole
        nodes = {*nodes, root}

    def emit(emission: Emission) -> None:
        tables = [emission.dense_rows(emission.value(table)).expand(size) for table in (cos, sin)]
        operands = [emission.dense_rows(emission.value(x)), *tables, emission.out(root)]
        emission.builder.call("rotary", operands, [rotated.kind])

    return Fusion(root, frozenset(nodes), emit)


def _with_the_rest(root: Node, x: Node) -> tuple[Node, Node] | None:
    """Where x is the first numbers of a head, and those behind them follow as they are: the head, and the whole."""
    cat, part = only_user(root), _part(x)
    if cat is None or part is None or not is_call(cat, aten.cat.default):
        return None
    parts: Any = cat.args[0]
    if len(parts) != 2 or parts[0] is not root or not _is_last(cat.args[1:], root):
        return None
    rotated, size = shape_of(root)[-1], shape_of(part.x)[-1]
    if part[1:] != (0, rotated, 1) or _part(parts[1]) != (part.x, rotated, size, 1):
        return None
    return part.x, cat


def _is_last(dim: tuple[Any, ...], node: Node) -> bool:
    return dim in ((-1,), (len(shape_of(node)) - 1,))


def _rotated(value: Any) -> _Rotated | None:
    if is_call(value, aten.cat.default) and len(value.args[0]) == 2:
        negated, other = value.args[0]
        return _exchanged(value, negated, other, _HALVES, {value})
    if is_call(value, aten.view.default) and is_call(value.args[0], aten.cat.default):
        cat = value.args[0]
        if len(cat.args[0]) == 2 and all(is_call(part, aten.unsqueeze.default) for part in cat.args[0]):
            first, second = cat.args[0]
            return _exchanged(cat, first.args[0], second.args[0], _PAIRS, {value, cat, first})
    return None


def _exchanged(cat: Node, negated: Any, other: Any, kind: int, nodes: set[Node]) -> _Rotated | None:
    if not _is_last(cat.args[1:], cat) or not is_call(negated, aten.neg.default):
        return None
    back, front = _part(negated.args[0]), _part(other)
    if back is None or front is None or back.x is not front.x:
        return None
    size = shape_of(back.x)[-1]
    halves = (size // 2, size, 1), (0, size // 2, 1)
    pairs = (1, size, 2), (0, size, 2)
    if (back[1:], front[1:]) != (halves if kind == _HALVES else pairs):
        return None
    return _Rotated(back.x, kind, {*nodes, negated})


def _part(value: Any) -> _Part | None:
    if not is_call(value, aten.slice.Tensor):
        return None
    given: Any = [*value.args, *(None, 0, None, None, 1)[len(value.args) :]]
    x, dim, begin, end, step = given
    size = shape_of(x)[-1]
    if dim not in (-1, len(shape_of(x)) - 1):
        return None
    indices = range(size)[slice(begin, end, step)]
    return _Part(x, indices.start, size if step > 1 else indices.stop, step)
