"""Operators of ATen, and this project's own, that are a call or a few of the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from furiosa_build.backends.native.builder import plan_dtype, refusal
from furiosa_build.backends.native.emission import Emission
from furiosa_build.backends.native.emit_attention import emit_paged_attention, emit_write_kv_cache
from furiosa_build.backends.native.emit_pointwise import emit_row_numbers, emit_sum
from furiosa_build.backends.native.opaque import paged_attention, write_kv_cache

aten = torch.ops.aten


def _argument(node: Node, number: int, default: Any = None) -> Any:
    return node.args[number] if len(node.args) > number else default


def _operands(emission: Emission, arguments: Sequence[Any]) -> list[Any]:
    return [emission.value(argument) if isinstance(argument, Node) else argument for argument in arguments]


def _cat(emission: Emission, node: Node) -> None:
    out, parts = emission.out(node), _argument(node, 0)
    dim, begin = _argument(node, 1, 0) % len(out.shape), 0
    for part in parts:
        if (
            part.meta["val"].dim() == 1 and part.meta["val"].numel() == 0
        ):  # torch leaves it out, whatever the others are
            continue
        value = emission.value(part)
        end = begin + value.shape[dim]
        if value.buffer is not out.buffer:
            emission.builder.call("copy", [value, out.slice(dim, begin, end)])
        begin = end


def _pad(emission: Emission, node: Node) -> None:
    x, pads = emission.value(node.args[0]), _argument(node, 1)  # type: ignore[arg-type]
    out = emission.out(node)
    filling = emission.builder.constant(torch.tensor(_argument(node, 2, 0), dtype=node.meta["val"].dtype))
    emission.builder.call("copy", [filling.expand(out.shape), out])
    inner = out
    for number, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        dim = len(x.shape) - 1 - number
        x = x.slice(dim, max(0, -before), x.shape[dim] - max(0, -after))
        inner = inner.slice(dim, max(0, before), inner.shape[dim] - max(0, after))
    emission.builder.call("copy", [x, inner])


def _slice_scatter(emission: Emission, node: Node) -> None:
    x, part, out = *_operands(emission, node.args[:2]), emission.out(node)
    emission.builder.call("copy", [x, out])
    place = out.slice(_argument(node, 2, 0), _argument(node, 3), _argument(node, 4), _argument(node, 5, 1))
    emission.builder.call("copy", [part, place])


def _repeat(emission: Emission, node: Node) -> None:
    x, counts, out = emission.value(node.args[0]), _argument(node, 1), emission.out(node)  # type: ignore[arg-type]
    for _ in range(len(counts) - len(x.shape)):
        x = x.unsqueeze(0)
    pairs = [number for count, size in zip(counts, x.shape, strict=True) for number in (count, size)]
    for dim in range(0, len(pairs), 2):
        x = x.unsqueeze(dim)
    spread, target = x.expand(pairs), out.reshape(pairs)
    if target is None:
        raise ValueError("a repetition is written to memory that is not in row-major order")
    emission.builder.call("copy", [spread, target])


_KINDS = {"sum": 0, "mean": 1, "amax": 2, "amin": 3, "argmax": 4}


def _reduce(name: str) -> Callable[[Emission, Node], None]:
    def emit(emission: Emission, node: Node) -> None:
        x, dims = emission.value(node.args[0]), _argument(node, 1)  # type: ignore[arg-type]
        rank = len(x.shape)
        dims = list(range(rank)) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
        reduced = sorted(dim % rank for dim in dims)
        kept = [dim for dim in range(rank) if dim not in reduced]
        out = emission.reshaped_out(node, [x.shape[dim] for dim in kept])
        emission.builder.call("reduce", [x.permute([*kept, *reduced]), out], [_KINDS[name], len(reduced)])

    return emit


def _any(emission: Emission, node: Node) -> None:
    """The largest of truth values."""
    of = _argument(node, 0)
    if of.meta["val"].dtype != torch.bool:
        raise refusal(f"{node.target} of numbers")
    _reduce("amax")(emission, node)


def _softmax(logarithm: int) -> Callable[[Emission, Node], None]:
    def emit(emission: Emission, node: Node) -> None:
        x, dim, out = emission.value(node.args[0]), _argument(node, 1), emission.out(node)  # type: ignore[arg-type]
        order = [d for d in range(len(x.shape)) if d != dim % len(x.shape)] + [dim % len(x.shape)]
        emission.builder.call("softmax", [x.permute(order), out.permute(order)], [logarithm])

    return emit


def _topk(emission: Emission, node: Node) -> None:
    x, count, dim, largest, _ = _operands(emission, [*node.args, *(-1, True, True)[len(node.args) - 2 :]])
    last = dim % len(x.shape) == len(x.shape) - 1
    if not (largest and last):
        raise refusal("aten.topk.default of the smallest numbers, or along a dimension that is not the last")
    shape = (*x.shape[:-1], count)
    values, places = emission.builder.new(shape, x.dtype), emission.builder.new(shape, "int64")
    emission.builder.call("topk", [x, values, places])
    emission.define(node, [values, places])


def _max_of_dim(emission: Emission, node: Node) -> None:
    """`max.dim`: the largest numbers, and their places."""
    x, dim, keeps = _operands(emission, [*node.args, False][:3])
    order = [*(d for d in range(len(x.shape)) if d != dim % len(x.shape)), dim % len(x.shape)]
    shape, rows = [x.shape[d] for d in order[:-1]], x.permute(order)
    found = [emission.builder.new(shape, dtype) for dtype in (x.dtype, "int64")]
    for result, name in zip(found, ("amax", "argmax"), strict=True):
        emission.builder.call("reduce", [rows, result], [_KINDS[name], 1])
    emission.define(node, [result.unsqueeze(dim % len(x.shape)) for result in found] if keeps else found)


def _scatter_value(emission: Emission, node: Node) -> None:
    x, dim, index, value = _operands(emission, node.args)
    is_of_rows = dim % len(x.shape) == len(x.shape) - 1 and tuple(index.shape[:-1]) == tuple(x.shape[:-1])
    if not is_of_rows or not node.meta["val"].dtype.is_floating_point:
        raise refusal("aten.scatter.value of integers, or of less than whole rows")
    emission.builder.call("scatter", [x, index, emission.out(node)], (), [float(value)])


def _embedding(emission: Emission, node: Node) -> None:
    weight, ids = node.args[:2]
    assert isinstance(weight, Node)
    assert isinstance(ids, Node)
    table = emission.weight(weight) or emission.value(weight)
    emission.builder.call("embedding", [table, emission.value(ids), emission.out(node)])


def _index_select(emission: Emission, node: Node) -> None:
    x, dim, index = _operands(emission, node.args)
    emission.builder.call("gather", [x, index, emission.out(node)], [0, dim % len(x.shape)])


def _gather(emission: Emission, node: Node) -> None:
    x, dim, index = _operands(emission, node.args[:3])
    emission.builder.call("gather", [x, index, emission.out(node)], [1, dim % len(x.shape)])


def is_read_of_slots(node: Node) -> bool:
    """Whether a node may be the rows of a KV cache that lie in slots [batch, context]."""
    if node.target is not aten.index.Tensor:
        return False
    slots = _argument(node, 1)
    return len(slots) == 1 and slots[0].meta["val"].dim() == 2 and slots[0].meta["val"].dtype == torch.int64


def _index(emission: Emission, node: Node) -> None:
    """Indices of adjacent dimensions, of one shape when broadcast: places in one dimension, by their number."""
    of, indices = _argument(node, 0), list(_argument(node, 1))
    x = emission.value(of)
    if emission.is_cache(of):
        operands = [x, emission.value(indices[0]), emission.out(node)]
        emission.builder.call("read_kv_cache", operands, [int(emission.has_values(of))])
        return
    dim = next(number for number, index in enumerate(indices) if index is not None)
    indices = indices[dim:]
    if any(index is None or index.meta["val"].dtype != torch.int64 for index in indices):
        raise refusal("aten.index.Tensor by masks, or of dimensions that are not adjacent")
    end = dim + len(indices)
    outer, sizes, inner = x.shape[:dim], x.shape[dim:end], x.shape[end:]
    shape = tuple(node.meta["val"].shape)[dim : node.meta["val"].dim() - len(inner)]
    values = [emission.value(index).expand(shape) for index in indices]
    place = values[0] if len(values) == 1 else emit_row_numbers(emission, values, sizes)
    out = emission.out(node)
    emission.builder.call("gather", [emission.reshaped(x, (*outer, math.prod(sizes), *inner)), place, out], [0, dim])


def _layer_norm(emission: Emission, node: Node) -> None:
    """`native_layer_norm`, of whose three results the first is used."""
    x, shape, weight, bias, eps = _operands(emission, node.args)
    if len(shape) != 1 or any(user.args[1] != 0 for user in node.users):
        raise refusal("aten.native_layer_norm over several dimensions, or for its statistics")
    out = emission.builder.new(x.shape, x.dtype)
    operands = [emission.dense_rows(x), None, weight, bias, out, None]
    emission.builder.call("norm", operands, [1, 0], [eps, 0.0])
    emission.define(node, [out])


def _matmul(emission: Emission, node: Node) -> None:
    a, b = _operands(emission, node.args[:2])
    emission.builder.call("matmul", [a, b, emission.out(node)])


def _linear(emission: Emission, node: Node) -> None:
    """With a weight that is not packed, such as one that was computed."""
    x, weight, bias = _operands(emission, [*node.args, None][:3])
    batch = x.shape[:-2]
    product = emission.builder.new(node.meta["val"].shape, plan_dtype(node.meta["val"].dtype))
    weight = weight.permute([1, 0]).expand((*batch, *weight.shape[::-1]))
    emission.builder.call("matmul", [x, weight, product])
    emission.define(node, product)
    if bias is not None:
        emission.define(node, emit_sum(emission, product, bias))


def _paged_attention(emission: Emission, node: Node) -> None:
    arguments = _operands(emission, [*node.args, *[None] * (13 - len(node.args))])
    named = {name: _operands(emission, [given])[0] for name, given in node.kwargs.items()}
    variant = dict(zip(("softcap", "sinks"), arguments[11:], strict=True)) | named
    emit_paged_attention(emission.builder, emission.out(node), *arguments[:11], **variant)


def _write_kv_cache(emission: Emission, node: Node) -> None:
    emit_write_kv_cache(emission.builder, *_operands(emission, node.args))


OPERATORS: Mapping[Any, Callable[[Emission, Node], None]] = {
    aten.cat.default: _cat,
    aten.constant_pad_nd.default: _pad,
    aten.slice_scatter.default: _slice_scatter,
    aten.repeat.default: _repeat,
    aten.sum.default: _reduce("sum"),
    aten.sum.dim_IntList: _reduce("sum"),
    aten.mean.default: _reduce("mean"),
    aten.mean.dim: _reduce("mean"),
    aten.amax.default: _reduce("amax"),
    aten.amin.default: _reduce("amin"),
    aten.any.default: _any,
    aten.any.dim: _any,
    aten.any.dims: _any,
    aten.argmax.default: _reduce("argmax"),
    aten._softmax.default: _softmax(0),
    aten._log_softmax.default: _softmax(1),
    aten.topk.default: _topk,
    aten.max.dim: _max_of_dim,
    aten.scatter.value: _scatter_value,
    aten.embedding.default: _embedding,
    aten.index_select.default: _index_select,
    aten.gather.default: _gather,
    aten.index.Tensor: _index,
    aten.native_layer_norm.default: _layer_norm,
    aten.linear.default: _linear,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    paged_attention: _paged_attention,
    write_kv_cache: _write_kv_cache,
}
"""What appends a node's calls."""
