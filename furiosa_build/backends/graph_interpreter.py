"""Runs a graph: a loop over its calls. No source code is generated, and only listed operators are called."""

from __future__ import annotations

import base64
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from furiosa_build.backends import ops
from furiosa_build.backends.graph import Graph
from furiosa_build.ir.graph import Call, Constant

_SYMBOLIC: dict[str, Callable[..., Any]] = {
    f"operator.{f.__name__}": f for f in (operator.getitem, operator.add, operator.sub, operator.mul)
}
"""Calls of Python that an exported graph may hold: arithmetic on sizes, and taking one of several results."""

_FILE_OPERATORS = {"from_file", "save"}
"""ATen operators that open files: no model calls them."""

_OWN = set(ops.REFERENCES)
"""Operators outside ATen."""


class GraphInterpreter(nn.Module):
    """A graph as a module: the inputs, in order -> a tuple of the outputs. KV caches are written in place.

    Args:
        graph: What is run.
        lowerings: Operator, as a graph names it -> the function that is called in its place.

    Raises:
        ValueError, TypeError or RuntimeError: The data is not that of a graph.
    """

    def __init__(self, graph: Graph, lowerings: Mapping[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        data = graph.data
        self._constants = [f"constant_{i}" for i in range(len(data.constants))]
        for name, constant in zip(self._constants, data.constants, strict=True):
            self.register_buffer(name, _tensor(constant), persistent=False)
        known = len(data.inputs) + len(data.constants)
        self._calls: list[_BoundCall] = []
        for number, call in enumerate(data.nodes):
            function = _resolve(call.op)
            _check_arguments(function, call)
            used: set[int] = set()
            args = [_decode(arg, known + number, used) for arg in call.args]
            kwargs = {name: _decode(arg, known + number, used) for name, arg in call.kwargs.items()}
            self._calls.append(_BoundCall((lowerings or {}).get(call.op, function), args, kwargs, used))
        self._results = [_check_index(index, known + len(data.nodes)) for index in data.results]
        self._release_early()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Runs every call in order."""
        values: list[Any] = [*inputs, *(getattr(self, name) for name in self._constants)]
        for call in self._calls:
            args = [_fill(arg, values) for arg in call.args]
            kwargs = {name: _fill(arg, values) for name, arg in call.kwargs.items()}
            values.append(call.function(*args, **kwargs))
            for index in call.releases:
                values[index] = None
        return tuple(values[index] for index in self._results)

    def _release_early(self) -> None:
        """Every value is released after its last use, so that its memory can be used again."""
        seen = set(self._results)
        for call in reversed(self._calls):
            call.releases -= seen
            seen |= call.releases


@dataclass
class _BoundCall:
    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    releases: set[int]
    """Values that no later call uses."""


@dataclass(frozen=True)
class _Value:
    """An argument that is a value of the graph, by its number."""

    index: int


def _fill(arg: Any, values: list[Any]) -> Any:
    if isinstance(arg, _Value):
        return values[arg.index]
    return [_fill(item, values) for item in arg] if isinstance(arg, list) else arg


def _resolve(op: str) -> Callable[..., Any]:
    if op in _SYMBOLIC:
        return _SYMBOLIC[op]
    namespace, _, rest = op.partition(".")
    name, _, overload = rest.partition(".")
    of_aten = namespace == "aten" and name not in _FILE_OPERATORS
    if not (of_aten or op in _OWN) or not name.isidentifier() or not overload.isidentifier():
        raise ValueError(f"a graph may only call ATen operators and {', '.join(sorted(_OWN))}, not {op!r}")
    found = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise TypeError(f"{op!r} is not an operator of torch")
    return found


def _check_arguments(function: Callable[..., Any], call: Call) -> None:
    if isinstance(function, torch._ops.OpOverload):
        fits = {argument.name for argument in function._schema.arguments}.issuperset(call.kwargs)
    else:
        match call.args:
            case [{"ref": _}, {"ref": _} | int()]:
                fits = not call.kwargs
            case [int(), {"ref": _}]:  # a number times a size; what is indexed is never a number
                fits = not call.kwargs and function is not operator.getitem
            case _:
                fits = False
    if not fits:
        raise ValueError(f"{call.op!r} takes no such arguments: {len(call.args)} and {sorted(call.kwargs)}")


def _check_index(index: int, known: int) -> int:
    if not 0 <= index < known:
        raise ValueError(f"there is no value {index} yet, only {known}")
    return index


def _decode(arg: Any, known: int, used: set[int]) -> Any:
    """An argument, of which the first `known` values may be part; those that are go to `used`."""
    match arg:
        case {"ref": int(index)}:
            used.add(_check_index(index, known))
            return _Value(index)
        case {"float": str(text)}:
            return float(text)
        case {"device": str(name)}:
            return torch.device(name)
        case {"torch": str(name)}:
            found = getattr(torch, name, None)
            if not isinstance(found, torch.dtype | torch.layout | torch.memory_format):
                raise TypeError(f"{name!r} is not a dtype, layout or memory format")
            return found
        case list():
            return [_decode(item, known, used) for item in arg]
        case dict():
            raise TypeError(f"not an argument: {arg!r}")
    return arg


def _tensor(constant: Constant) -> Tensor:
    data = bytearray(base64.b64decode(constant.data, validate=True))
    dtype = getattr(torch, constant.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{constant.dtype!r} is not a dtype")
    return torch.frombuffer(data, dtype=dtype).reshape(constant.shape)
