"""Operators of ATen that give another view of a tensor: no call, unless the view cannot be had without a copy."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from furiosa_build.backends.native.builder import plan_dtype
from furiosa_build.backends.native.emission import Emission
from furiosa_build.backends.native.values import Value

aten = torch.ops.aten


def _argument(node: Node, number: int, default: Any = None) -> Any:
    return node.args[number] if len(node.args) > number else default


def _x(emission: Emission, node: Node) -> Value:
    [x, *_] = node.args
    assert isinstance(x, Node)
    return emission.value(x)


def _same(emission: Emission, node: Node) -> Value:
    return _x(emission, node)


def _view(emission: Emission, node: Node) -> Value:
    return emission.reshaped(_x(emission, node), tuple(node.meta["val"].shape))


def _permute(emission: Emission, node: Node) -> Value:
    return _x(emission, node).permute(_argument(node, 1))


def _expand(emission: Emission, node: Node) -> Value:
    return _x(emission, node).expand(tuple(node.meta["val"].shape))


def _slice(emission: Emission, node: Node) -> Value:
    begin, end, step = _argument(node, 2), _argument(node, 3), _argument(node, 4, 1)
    return _x(emission, node).slice(_argument(node, 1, 0), begin, end, step)


def _select(emission: Emission, node: Node) -> Value:
    return _x(emission, node).select(_argument(node, 1), _argument(node, 2))


def _bitcast(emission: Emission, node: Node) -> Value:
    return _x(emission, node).bitcast(plan_dtype(node.meta["val"].dtype))


def _split(emission: Emission, node: Node) -> list[Value]:
    x, dim, begin, parts = _x(emission, node), _argument(node, 2, 0), 0, []
    for size in _argument(node, 1):
        parts.append(x.slice(dim, begin, begin + size))
        begin += size
    return parts


def _unbind(emission: Emission, node: Node) -> list[Value]:
    x, dim = _x(emission, node), _argument(node, 1, 0)
    return [x.select(dim, index) for index in range(x.shape[dim])]


def _item(emission: Emission, node: Node) -> Value:
    of, number = node.args
    assert isinstance(of, Node)
    assert isinstance(number, int)
    return emission.values(of)[number]


VIEWS: Mapping[Any, Callable[[Emission, Node], Value | list[Value]]] = {
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.unsqueeze.default: _view,
    aten.squeeze.default: _view,
    aten.squeeze.dim: _view,
    aten.squeeze.dims: _view,
    aten.permute.default: _permute,
    aten.expand.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.view.dtype: _bitcast,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    operator.getitem: _item,
}
"""What the node's tensor, or its tensors, are."""
