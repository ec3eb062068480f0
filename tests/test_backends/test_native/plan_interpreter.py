"""Runs plans through torch, call by call: what emission is checked by, without the library."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from furiosa_build.backends import ops
from furiosa_build.backends.native.packing import unpack
from furiosa_build.backends.native.plan import Call, Plan, View
from furiosa_build.backends.native.pointwise import INSTRUCTIONS, LOAD, STORE
from furiosa_build.ir.dtypes import ITEMSIZE
from furiosa_build.ir.tensors import Layout

NAMES = {instruction.code: name for name, instruction in INSTRUCTIONS.items()}
UNLIKE_TORCH: dict[str, Callable[..., Any]] = {
    "to_int": lambda x: x.trunc().to(torch.int64),
    "to_bool": lambda x: (x != 0).long(),
    "int_to_bool": lambda x: (torch.as_tensor(x) != 0).long(),
    "to_float": lambda x: torch.as_tensor(x).float(),
    "round_bf16": lambda x: x.bfloat16().float(),
    "round_f16": lambda x: x.half().float(),
    "floor_divide_int": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "truncate_divide_int": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "and_int": operator.and_,
    "or_int": operator.or_,
    "xor_int": operator.xor,
    "not_int": operator.invert,
}


def run_plan(plan: Plan, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs. What lies in the arena begins as NaN, and never has another meaning than the last one written."""
    outputs = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in plan.outputs]
    constants = torch.frombuffer(bytearray(plan.constants_blob) or bytearray(1), dtype=torch.uint8)
    arena = torch.full((plan.arena + 1,), 0xFF, dtype=torch.uint8)
    buffers = [*inputs, *outputs, constants, arena]
    for call in plan.calls:
        tensors = [None if view is None else _tensor(buffers, view) for view in plan.operands(call)]
        OPERATORS[call.op](tensors, call)
    return outputs


def _tensor(buffers: Sequence[Tensor], view: View) -> Tensor:
    dtype, buffer = getattr(torch, view.dtype), buffers[view.buffer]
    if view.shape and view.shape[0] == 0:  # a KV cache
        return buffer
    if view.end == view.offset:
        return torch.empty(view.shape, dtype=dtype)
    flat = buffer.reshape(-1).view(torch.uint8)[: buffer.nbytes // ITEMSIZE[view.dtype] * ITEMSIZE[view.dtype]]
    whole = flat[
        view.offset : view.offset + (flat.numel() - view.offset) // ITEMSIZE[view.dtype] * ITEMSIZE[view.dtype]
    ]
    if whole.storage_offset() % ITEMSIZE[view.dtype]:
        raise ValueError("a view begins within an element")
    return whole.view(dtype).as_strided(view.shape, view.stride, whole.view(dtype).storage_offset())


def _pointwise(tensors: Sequence[Any], call: Call) -> None:
    registers: dict[int, Any] = {}
    constants = [float(number) for number in call.floats]

    def argument(number: int, kind: str) -> Any:
        if number >= 0:
            return registers[number]
        value = constants[-1 - number]
        return torch.tensor(value) if kind == "f" else torch.tensor(int(value))

    for at in range(1, len(call.ints), 5):
        code, d, *given = call.ints[at : at + 5]
        name = NAMES[code]
        if name == LOAD:
            own = tensors[given[0]]
            registers[d] = own.float() if own.dtype.is_floating_point else own.long()
        elif name == STORE:
            tensors[d].copy_(registers[given[0]])
        else:
            kinds = INSTRUCTIONS[name].arguments
            arguments = [argument(number, kind) for number, kind in zip(given, kinds, strict=False)]
            registers[d] = _instruction(name, arguments)


def _instruction(name: str, arguments: list[Any]) -> Tensor:
    if name in UNLIKE_TORCH:
        result = UNLIKE_TORCH[name](*arguments)
    elif name.startswith("where"):
        result = torch.where(arguments[0] != 0, *arguments[1:])
    else:
        result = getattr(torch, name.removesuffix("_int"))(*arguments)
    return result if result.dtype.is_floating_point else result.long()  # type: ignore[no-any-return]


def _copy(tensors: Sequence[Any], call: Call) -> None:
    del call
    x, out = tensors
    assert x.shape == out.shape
    out.copy_(x)


def _reduce(tensors: Sequence[Any], call: Call) -> None:
    x, out = tensors
    kind, count = call.ints
    dims = tuple(range(x.dim() - count, x.dim()))
    x = x.float() if x.dtype.is_floating_point else x
    out.copy_(
        (torch.sum, torch.mean, torch.amax, torch.amin)[kind](x, dims) if kind < 4 else x.flatten(-count).argmax(-1)
    )


def _softmax(tensors: Sequence[Any], call: Call) -> None:
    x, out = tensors
    out.copy_((torch.log_softmax if call.ints[0] else torch.softmax)(x.float(), -1))


def _plain(weight: Tensor, columns: int) -> Tensor:
    """A packed weight, with its rows of padding."""
    if weight.dim() < 3:
        return weight
    layout = Layout(str(weight.dtype).removeprefix("torch."), (weight.shape[0] * 32, columns))
    return unpack(weight.contiguous(), layout)


def _embedding(tensors: Sequence[Any], call: Call) -> None:
    del call
    weight, ids, out = tensors
    out.copy_(_plain(weight, out.shape[-1])[ids])


def _norm(tensors: Sequence[Any], call: Call) -> None:
    x, residual, weight, bias, out, total = tensors
    (kind, rounds), (eps, offset) = call.ints, (float(number) for number in call.floats)
    h = x.float()
    if residual is not None:
        total.copy_(h + residual.float())
        h = total.float()
    if kind == 1:
        h = h - h.mean(-1, keepdim=True)
    h = h / torch.sqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h.to(x.dtype).float() if rounds else h
    h = h if weight is None else h * (weight.float() + offset)
    out.copy_(h if bias is None else h + bias.float())


def _rotary(tensors: Sequence[Any], call: Call) -> None:
    x, cos, sin, out = tensors
    size = cos.shape[-1]
    turned = x[..., :size].float()
    if call.ints[0] == 0:
        other = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], -1)
    else:
        other = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    out.copy_(torch.cat([turned * cos.float() + other * sin.float(), x[..., size:].float()], -1))


def _linear(tensors: Sequence[Any], call: Call) -> None:
    x, x_scale, *others = tensors
    for number, format_ in enumerate(call.ints):
        weight, scale, bias, residual, out = others[5 * number : 5 * number + 5]
        if format_ == 4:
            weight = weight.view(torch.float8_e4m3fn)
        numbers = _plain(weight, x.shape[-1]).float()[: out.shape[-1]]
        y = x.float() @ (numbers - 128 if format_ == 3 else numbers).T
        y = y if x_scale is None else y * x_scale[:, None]
        for factor in [] if scale is None else [scale.float()]:
            y = y * factor
        for summand in (bias, residual):
            y = y if summand is None else y + summand.float()
        out.copy_(y)


def _round_rows(tensors: Sequence[Any], call: Call) -> None:
    x, largest, rows, scales = tensors
    largest = x.float().abs().amax(-1) if largest is None else largest.float()
    scale = largest / (127.5 if call.ints[0] == 3 else 448.0)
    scale = scale.to(x.dtype).float()
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    steps = (x.float() / scale[:, None]).to(x.dtype).float()
    if call.ints[0] == 3:
        rows.copy_(steps.clamp(-128, 127).round())
    else:
        rows.copy_(steps.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    scales.copy_(scale)


def _unpack(tensors: Sequence[Any], call: Call) -> None:
    del call
    packed, out = tensors
    out.copy_(_plain(packed, out.shape[1])[: out.shape[0]])


def _gather(tensors: Sequence[Any], call: Call) -> None:
    x, index, out = tensors
    kind, dim = call.ints
    index = torch.where(index < 0, index + x.shape[dim], index)
    out.copy_(x.gather(dim, index) if kind else x.index_select(dim, index.flatten()).reshape(out.shape))


def _write_kv_cache(tensors: Sequence[Any], call: Call) -> None:
    del call
    ops.write_kv_cache_reference(*tensors)


def _paged_attention(tensors: Sequence[Any], call: Call) -> None:
    query, key, value, key_cache, value_cache, slots, lens, positions, sinks, out, partial = tensors
    if slots is None:
        key_cache, value_cache = (t.new_empty((0, t.shape[1], t.shape[3])) for t in (key, value))
        new = torch.arange(query.shape[2]).expand(query.shape[0], -1)
        key_cache, value_cache = (t.transpose(1, 2).flatten(0, 1) for t in (key, value))
        slots = torch.arange(query.shape[0] * query.shape[2]).reshape(query.shape[0], -1)
        positions, lens = new, torch.full((query.shape[0],), query.shape[2])
    window, (scaling, softcap) = call.ints[0], call.floats
    arguments = query, None, None, key_cache, value_cache, None, slots, lens, positions
    out.copy_(ops.paged_attention_reference(*arguments, float(scaling), window or None, float(softcap) or None, sinks))


def _matmul(tensors: Sequence[Any], call: Call) -> None:
    del call
    a, b, out = tensors
    out.copy_(a.float() @ b.float())


OPERATORS: dict[str, Callable[[Sequence[Any], Call], None]] = {
    "pointwise": _pointwise,
    "copy": _copy,
    "reduce": _reduce,
    "softmax": _softmax,
    "embedding": _embedding,
    "norm": _norm,
    "rotary": _rotary,
    "linear": _linear,
    "round_rows": _round_rows,
    "unpack": _unpack,
    "write_kv_cache": _write_kv_cache,
    "paged_attention": _paged_attention,
    "gather": _gather,
    "matmul": _matmul,
}
