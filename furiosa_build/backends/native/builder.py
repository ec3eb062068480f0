"""Makes a plan: values and calls in order, then memory for what lies between the calls."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from furiosa_build.backends.native.memory import lay_out
from furiosa_build.backends.native.plan import ALIGNMENT, Call, DType, Number, Plan, TensorType, View
from furiosa_build.backends.native.values import Buffer, Value
from furiosa_build.core.errors import UserError
from furiosa_build.ir.dtypes import ITEMSIZE


def refusal(operator: str) -> UserError:
    """The error for a graph with something that the library does not have."""
    return UserError(
        f"backend native has no kernel for {operator}", where="backend.name", hint="build with backend=inductor"
    )


class Builder:
    """A plan in the making.

    Args:
        inputs: What the program is given.
        outputs: What it returns.
    """

    def __init__(self, inputs: Sequence[TensorType], outputs: Sequence[TensorType]) -> None:
        self._inputs, self._outputs = list(inputs), list(outputs)
        self._constants = bytearray()
        self._calls: list[BuiltCall] = []
        self.inputs = [_whole("input", number, spec) for number, spec in enumerate(inputs)]
        self.outputs = [_whole("output", number, spec) for number, spec in enumerate(outputs)]

    def new(self, shape: Sequence[int], dtype: DType) -> Value:
        """A new tensor between calls, in row-major order."""
        value = Value.whole(Buffer("arena", -1), dtype, shape)
        value.buffer.nbytes = value.numel * ITEMSIZE[dtype]
        return value

    def constant(self, tensor: Tensor) -> Value:
        """A tensor that is part of the plan."""
        flat = tensor.detach().contiguous()
        self._constants += bytes(-len(self._constants) % ALIGNMENT)
        buffer = Buffer("constant", len(self._constants), flat.nbytes)
        self._constants += flat.reshape(-1).view(torch.uint8).numpy().tobytes()
        return Value.whole(buffer, plan_dtype(flat.dtype), flat.shape)

    def call(
        self,
        op: str,
        tensors: Sequence[Value | None],
        ints: Sequence[int] = (),
        floats: Sequence[float] = (),
    ) -> None:
        """Appends a call; operands are in the order of the operator's description in `operators.py`."""
        self._calls.append(BuiltCall(op, tuple(tensors), tuple(ints), tuple(floats)))

    def finish(self) -> Plan:
        """The plan of all calls so far."""
        arena = lay_out([(call.op, call.tensors) for call in self._calls])
        views: dict[_Key, int] = {}
        calls = []
        for call in self._calls:
            numbers = [None if v is None else views.setdefault(self._key(v), len(views)) for v in call.tensors]
            calls.append(
                Call(op=call.op, tensors=numbers, ints=list(call.ints), floats=[_plain(x) for x in call.floats])
            )
        return Plan(
            inputs=self._inputs,
            outputs=self._outputs,
            constants=base64.b64encode(self._constants).decode(),
            arena=arena,
            tensors=[
                View(buffer=buffer, offset=offset, dtype=dtype, shape=list(shape), stride=list(stride))
                for buffer, offset, dtype, shape, stride in views
            ],
            calls=calls,
        )

    def _key(self, value: Value) -> _Key:
        kind, place, offset = value.buffer.kind, value.buffer.place, value.offset
        count = len(self._inputs) + len(self._outputs)
        match kind:
            case "input":
                number = place
            case "output":
                number = len(self._inputs) + place
            case "constant":
                number, offset = count, place + offset
            case "arena":
                number, offset = count + 1, place + offset
        return number, offset, value.dtype, value.shape, value.stride


class BuiltCall:
    """A call, of values."""

    def __init__(
        self, op: str, tensors: tuple[Value | None, ...], ints: tuple[int, ...], floats: tuple[float, ...]
    ) -> None:
        self.op, self.tensors, self.ints, self.floats = op, tensors, ints, floats


_Key = tuple[int, int, DType, tuple[int, ...], tuple[int, ...]]


def plan_dtype(dtype: torch.dtype) -> DType:
    """A dtype as plans name it. Raises UserError for one that the library does not have."""
    name = str(dtype).removeprefix("torch.")
    if name == "float8_e4m3fn":
        return "uint8"
    if name not in DType.__args__:  # type: ignore[attr-defined]
        raise refusal(f"tensors of {name}")
    return name  # type: ignore[return-value]


def _whole(kind: str, number: int, spec: TensorType) -> Value:
    shape = [0 if size is None else size for size in spec.shape]
    return Value.whole(Buffer(kind, number), spec.dtype, shape)  # type: ignore[arg-type]


def _plain(x: float) -> Number:
    return x if math.isfinite(x) else str(x)  # type: ignore[return-value]
