"""Emission: what the nodes of a lowered graph are in the plan in the making, and where their tensors go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from furiosa_build.backends.native.builder import Builder, plan_dtype
from furiosa_build.backends.native.packing import is_packed, pack, packed_layout
from furiosa_build.backends.native.plan import TensorType
from furiosa_build.backends.native.values import Value
from furiosa_build.ir.tensors import Layout, TensorSpec

_RESHAPES = {torch.ops.aten.view.default, torch.ops.aten.unsqueeze.default, torch.ops.aten.clone.default}


class Emission:
    """A plan in the making.

    Args:
        inputs: The graph's inputs: nodes, and what they stand for.
        outputs: The nodes that are returned, and what they are.
        constants: The nodes whose tensors are known.
        covered: The nodes that are computed within others.

    Attributes:
        builder: Where calls are appended.
    """

    def __init__(
        self,
        inputs: Sequence[tuple[Node, TensorSpec]],
        outputs: Sequence[tuple[Node, TensorSpec]],
        constants: Mapping[Node, Tensor],
        covered: Collection[Node],
    ) -> None:
        self.builder = Builder([_input_type(spec) for _, spec in inputs], [_type(layout_of(s)) for _, s in outputs])
        self._results = [node for node, _ in outputs]
        self._inputs = {node: self.builder.inputs[number] for number, (node, _) in enumerate(inputs)}
        self._packed = {node for node, spec in inputs if is_packed_input(spec)}
        self._caches = {node: spec.name for node, spec in inputs if None in spec.shape}
        self._constants, self._covered = constants, covered
        self._values: dict[Node, Value | list[Value]] = {}
        self._outs: dict[Node, Value] = {}
        self._weights: dict[Node, Value] = {}

    def finish(self) -> None:
        """Copies what is returned to the outputs, as far as it is not there."""
        for node, out in zip(self._results, self.builder.outputs, strict=True):
            value = self.value(node)
            if value.buffer is not out.buffer:
                self.builder.call("copy", [value, out])

    # What nodes are

    def value(self, node: Node) -> Value:
        """A node's tensor, as torch has it."""
        if node not in self._values:
            self._values[node] = self._outer_value(node)
        found = self._values[node]
        assert isinstance(found, Value)
        return found

    def values(self, node: Node) -> list[Value]:
        """The tensors of a node that has several."""
        found = self._values[node]
        assert isinstance(found, list)
        return found

    def define(self, node: Node, value: Value | list[Value]) -> None:
        """Says what a node's tensor, or its tensors, are."""
        self._values[node] = value

    def weight(self, node: Node) -> Value | None:
        """The packed form of a parameter or constant; None where it has none."""
        if node in self._packed:
            return self._inputs[node]
        constant = self._constants.get(node)
        if constant is None or not is_packed(Layout.of(constant)):
            return None
        if node not in self._weights:
            self._weights[node] = self.builder.constant(pack(constant))
        return self._weights[node]

    def constant(self, node: Node) -> Tensor | None:
        """What a node is where that is known when the program is compiled."""
        return self._constants.get(node)

    def is_cache(self, node: Node) -> bool:
        """Whether a node is a KV cache: an input whose number of slots is not known."""
        return node in self._caches

    def has_values(self, cache: Node) -> bool:
        """Whether it is a cache of values: its layout is not that of keys."""
        return self._caches[cache] == "value_cache"

    def _outer_value(self, node: Node) -> Value:
        """An input or a constant. A packed one is unpacked: what takes it as it is asks for `weight`."""
        if node in self._constants:
            tensor = self._constants[node]
            if tensor.numel() > 1 and not any(tensor.stride()):
                return self.builder.constant(tensor[(0,) * tensor.dim()]).expand(tuple(tensor.shape))
            return self.builder.constant(tensor)
        given = self._inputs[node]
        if node not in self._packed:
            return given
        plain = self.builder.new(tuple(node.meta["val"].shape), plan_dtype(node.meta["val"].dtype))
        self.builder.call("unpack", [given, plain])
        return plain

    # Where they go

    def out(self, node: Node) -> Value:
        """Memory for a node's tensor: the program's output, a part of a concatenation, or its own."""
        out = self._out(node)
        self._values[node] = out
        return out

    def reshaped_out(self, node: Node, shape: Sequence[int]) -> Value:
        """`out`, in a shape that has fewer or more dimensions of one."""
        found = self.out(node).reshape(shape)
        assert found is not None
        return found

    def matrix_out(self, node: Node) -> Value:
        """`out` where that is rows of a matrix; else memory that `settle` copies to it."""
        out = self.out(node)
        rows = out.reshape((out.numel // out.shape[-1], out.shape[-1]))
        if rows is not None and (rows.stride[-1] == 1 or rows.shape[-1] == 1):
            return out
        own = self.builder.new(out.shape, out.dtype)
        self._values[node] = own
        return own

    def settle(self, node: Node) -> None:
        """Copies what `matrix_out` gave to where it belongs, if that is elsewhere."""
        value, out = self.value(node), self._out(node)
        if value is not out:
            self.builder.call("copy", [value, out])
            self._values[node] = out

    def _out(self, node: Node) -> Value:
        if node not in self._outs:
            self._outs[node] = self._place(node)
        return self._outs[node]

    def _place(self, node: Node) -> Value:
        meta = node.meta["val"]
        shape, dtype = tuple(meta.shape), plan_dtype(meta.dtype)
        if node in self._results:
            out = self.builder.outputs[self._results.index(node)]
            if all(out.buffer is not other.buffer for other in self._outs.values()):
                return out
        users = list(node.users)
        user = users[0] if len(users) == 1 else None
        if user is not None and user.op == "call_function" and user not in self._covered:
            if user.target is torch.ops.aten.cat.default and user.meta["val"].dtype == meta.dtype:
                place = _place_in(user, node)
                if place is not None:
                    return self._out(user).slice(*place)
            if user.target in _RESHAPES:
                whole = self._out(user).reshape(shape)
                if whole is not None:
                    return whole
        return self.builder.new(shape, dtype)

    # Forms that calls need

    def copied(self, value: Value) -> Value:
        """The same tensor, in row-major order in memory of its own."""
        own = self.builder.new(value.shape, value.dtype)
        self.builder.call("copy", [value, own])
        return own

    def dense(self, value: Value) -> Value:
        """The same tensor, copied unless it is in row-major order."""
        return value if value.is_contiguous else self.copied(value)

    def dense_rows(self, value: Value) -> Value:
        """The same tensor, copied unless its last dimension is contiguous."""
        return value if value.stride[-1] == 1 or value.shape[-1] == 1 else self.copied(value)

    def reshaped(self, value: Value, shape: Sequence[int]) -> Value:
        """The same elements in another shape, copied if they have to be."""
        found = value.reshape(shape)
        if found is None:
            found = self.copied(value).reshape(shape)
        assert found is not None
        return found


def is_packed_input(spec: TensorSpec) -> bool:
    """Whether an input is given in the library's layout for matrices."""
    return spec.role == "parameter" and is_packed(layout_of(spec))


def layout_of(spec: TensorSpec) -> Layout:
    """The layout that a parameter or output is declared with."""
    return Layout(spec.dtype, tuple(size or 0 for size in spec.shape))


def _input_type(spec: TensorSpec) -> TensorType:
    if spec.role == "parameter":
        return _type(packed_layout(layout_of(spec)))
    return TensorType(dtype=plan_dtype(getattr(torch, spec.dtype)), shape=spec.shape)


def _type(layout: Layout) -> TensorType:
    return TensorType(dtype=plan_dtype(getattr(torch, layout.dtype)), shape=list(layout.shape))


def _place_in(cat: Node, part: Node) -> tuple[int, int, int] | None:
    """Dimension, begin and end of the one place that a tensor has in a concatenation."""
    given: Any = cat.args
    parts = list(given[0])
    dim = (given[1] if len(given) > 1 else 0) % cat.meta["val"].dim()
    if parts.count(part) != 1:
        return None
    begin = sum(node.meta["val"].shape[dim] for node in parts[: parts.index(part)])
    return dim, begin, begin + part.meta["val"].shape[dim]
