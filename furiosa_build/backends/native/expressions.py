"""Pointwise operators of ATen as instructions of operator `pointwise`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from furiosa_build.backends.native.assembler import Argument, Assembler, Kind, Register

aten = torch.ops.aten

Expression = Callable[[Assembler, Node, Sequence[Any]], Register]
"""Writes the instructions of a node; its arguments are given as registers and numbers."""

_UNARY = (
    "abs neg reciprocal rsqrt sqrt exp exp2 expm1 log log2 log1p sigmoid tanh erf floor ceil round trunc cos sin sign"
)
_BINARY = "mul maximum minimum fmod remainder"
_COMPARISONS = "eq ne lt le gt ge"
_OF_INTEGERS = {"abs", "neg", "sign", "mul", "maximum", "minimum", "fmod", "remainder"}
_UNCHANGED_INTEGERS = {"floor", "ceil", "round", "trunc"}


def kind_of(node: Node) -> Kind:
    """What registers hold the numbers of a node's tensor."""
    return "f" if dtype_of(node).is_floating_point else "i"


def dtype_of(node: Node) -> torch.dtype:
    """The dtype of a node's tensor."""
    return node.meta["val"].dtype  # type: ignore[no-any-return]


def _unary(name: str) -> Expression:
    def write(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
        kind = kind_of(node)
        x = to.as_kind(arguments[0], kind)
        if kind == "i":
            return x if name in _UNCHANGED_INTEGERS else to.emit(f"{name}_int", x)
        return to.emit(name, x)

    return write


def _arithmetic(to: Assembler, node: Node, name: str, *arguments: Argument) -> Register:
    """An operation in the arithmetic of the node's dtype."""
    kind = kind_of(node)
    given = [to.as_kind(a, kind) if isinstance(a, Register) else a for a in arguments]
    return to.emit(name if kind == "f" else f"{name}_int", *given)


def _binary(name: str) -> Expression:
    return lambda to, node, arguments: _arithmetic(to, node, name, *arguments[:2])


def _sum(name: str) -> Expression:
    def write(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
        left, right = arguments[:2]
        alpha: Any = node.kwargs.get("alpha", 1)
        if alpha != 1:
            right = right * alpha if not isinstance(right, Register) else _arithmetic(to, node, "mul", right, alpha)
        if dtype_of(node) == torch.bool:
            return to.emit("or_int", left, right)
        return _arithmetic(to, node, name, left, right)

    return write


def _div(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
    mode = node.kwargs.get("rounding_mode")
    if kind_of(node) == "i":
        return to.emit("floor_divide_int" if mode == "floor" else "truncate_divide_int", *arguments[:2])
    quotient = to.emit("div", *arguments[:2])
    return quotient if mode is None else to.emit({"floor": "floor", "trunc": "trunc"}[str(mode)], quotient)


def _compare(name: str) -> Expression:
    def write(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
        del node
        left, right = arguments[:2]
        floating = any(a.kind == "f" if isinstance(a, Register) else isinstance(a, float) for a in (left, right))
        return to.emit(name if floating else f"{name}_int", left, right)

    return write


def _pow(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
    base, exponent = arguments[:2]
    if isinstance(exponent, Register) or not isinstance(base, Register):
        return to.emit("pow", *(to.as_kind(a, "f") if isinstance(a, Register) else a for a in (base, exponent)))
    roots = {0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
    if exponent in roots:
        return to.emit(roots[exponent], base)
    if exponent in (2, 3):
        square = _arithmetic(to, node, "mul", base, base)
        return square if exponent == 2 else _arithmetic(to, node, "mul", square, base)
    return to.emit("pow", base, float(exponent))


def _logical(name: str) -> Expression:
    def write(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
        del node
        left, right = (_truth(to, argument) for argument in arguments[:2])
        return to.emit(name, left, right)

    return write


def _truth(to: Assembler, argument: Argument) -> Register:
    """Whether a number is not zero."""
    if isinstance(argument, Register) and argument.kind == "f":
        return to.emit("to_bool", argument)
    return to.emit("int_to_bool", argument)


def _as_it_is(name: str) -> Expression:
    """An instruction of the arguments as they come."""

    def write(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
        del node
        return to.emit(name, *arguments)

    return write


def _not(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
    if dtype_of(node) == torch.bool:
        return to.emit("eq_int", _truth(to, arguments[0]), 0)
    return to.emit("not_int", arguments[0])


def _where(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
    condition, left, right = arguments
    return to.emit("where" if kind_of(node) == "f" else "where_int", condition, left, right)


def _clamp(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
    bounds = dict(zip(("min", "max"), arguments[1:], strict=False))
    bounds |= {name: value for name, value in node.kwargs.items() if not isinstance(value, Node)}
    result = to.as_kind(arguments[0], kind_of(node))
    if bounds.get("min") is not None:
        result = _arithmetic(to, node, "maximum", result, bounds["min"])
    if bounds.get("max") is not None:
        result = _arithmetic(to, node, "minimum", result, bounds["max"])
    return result


def _relu(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
    return _arithmetic(to, node, "maximum", arguments[0], 0)


def _silu(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
    del node
    return to.emit("mul", arguments[0], to.emit("sigmoid", arguments[0]))


def _gelu(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
    x = arguments[0]
    if node.kwargs.get("approximate", "none") == "tanh":
        cube = to.emit("mul", to.emit("mul", x, x), x)
        inner = to.emit("mul", to.emit("add", x, to.emit("mul", cube, 0.044715)), math.sqrt(2 / math.pi))
        share = to.emit("add", to.emit("tanh", inner), 1.0)
    else:
        share = to.emit("add", to.emit("erf", to.emit("mul", x, math.sqrt(0.5))), 1.0)
    return to.emit("mul", to.emit("mul", x, 0.5), share)


def _leaky_relu(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
    del node
    x, slope = arguments[0], (arguments[1] if len(arguments) > 1 else 0.01)
    return to.emit("where", to.emit("gt", x, 0.0), x, to.emit("mul", x, slope))


_ROUND = {
    torch.bfloat16: "round_bf16",
    torch.float16: "round_f16",
    torch.int32: "to_int32",
    torch.int16: "to_int16",
    torch.int8: "to_int8",
    torch.uint8: "to_uint8",
}


def _convert(to: Assembler, node: Node, arguments: Sequence[Any]) -> Register:
    """`_to_copy` of a tensor, or `copy` of one over another."""
    x, wanted = arguments[-1], dtype_of(node)
    if wanted == torch.bool:
        return _truth(to, x)
    result = to.as_kind(x, kind_of(node))
    return to.emit(_ROUND[wanted], result) if wanted in _ROUND else result


def _expressions() -> dict[Any, Expression]:
    found: dict[Any, Expression] = {}

    def add(name: str, expression: Expression, *overloads: str) -> None:
        packet = getattr(aten, name)
        for overload in overloads or ("default", "Tensor", "Scalar"):
            if overload in packet.overloads():
                found[getattr(packet, overload)] = expression

    for name in _UNARY.split():
        add(name, _unary(name), "default")
    for name in _BINARY.split():
        add(name, _binary(name))
    for name in _COMPARISONS.split():
        add(name, _compare(name))
    for name in ("and", "or", "xor"):
        add(f"logical_{name}", _logical(f"{name}_int"))
        add(f"bitwise_{name}", _as_it_is(f"{name}_int"))
    add("add", _sum("add"))
    add("sub", _sum("sub"))
    add("div", _div, "Tensor", "Scalar", "Tensor_mode", "Scalar_mode")
    add("pow", _pow, "Tensor_Scalar", "Tensor_Tensor", "Scalar")
    add("logical_not", _not)
    add("bitwise_not", _not)
    add("where", _where, "self", "ScalarOther", "ScalarSelf", "Scalar")
    add("clamp", _clamp, "default", "Tensor")
    add("relu", _relu)
    add("silu", _silu)
    add("gelu", _gelu)
    add("leaky_relu", _leaky_relu)
    add("isnan", _as_it_is("isnan"))
    add("isinf", _as_it_is("isinf"))
    add("_to_copy", _convert)
    add("copy", _convert)
    return found


EXPRESSIONS: Mapping[Any, Expression] = _expressions()
"""Operators of ATen that are pointwise, and how they are written."""
