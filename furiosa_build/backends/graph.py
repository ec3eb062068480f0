"""Graph: what partition hands to a backend. A flat list of ATen calls, as canonical JSON.

Plain data on purpose: reading one runs no code (`torch.export.load` evaluates expressions), equal graphs are equal
bytes, and a person can diff two. Values are numbered: inputs first, then constants, then one number a node.
"""

from __future__ import annotations

import base64
import keyword
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.ir.graph import Call, Constant, GraphData
from furiosa_build.ir.tensors import TensorSpec

_SYMBOLIC = {f"operator.{f.__name__}": f for f in (operator.getitem, operator.add, operator.sub, operator.mul)}
"""Calls outside ATen that an exported graph may hold: arithmetic on sizes, and taking one of several results."""

_FILE_OPERATORS = {"from_file", "save"}
"""ATen operators that open files: no model calls them."""


@dataclass(frozen=True)
class Graph:
    """A traced supertask: typed inputs, ATen calls, typed outputs."""

    data: GraphData

    @property
    def inputs(self) -> list[TensorSpec]:
        return self.data.inputs

    @property
    def outputs(self) -> list[TensorSpec]:
        return self.data.outputs

    def to_json(self) -> bytes:
        """Canonical bytes: two equal graphs give the same."""
        return canonical_json(self.data.model_dump(mode="json"))

    @staticmethod
    def from_json(text: bytes) -> Graph:
        """Raises pydantic.ValidationError when `text` is not a graph."""
        return Graph(GraphData.model_validate_json(text))

    @staticmethod
    def from_exported(program: ExportedProgram, inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> Graph:
        """Takes over an exported program whose user inputs are `inputs`, in order, and names its outputs.

        What no output depends on is left out: inputs, dead calls, checks that only repeat what the types say.
        """
        live = live_nodes(program)
        calls = [node for node in program.graph.nodes if node.op == "call_function" and node in live]
        return Graph.from_nodes(program, user_inputs(program, inputs), calls, returned_nodes(program), outputs)

    @staticmethod
    def from_nodes(
        program: ExportedProgram,
        inputs: Sequence[tuple[Node, TensorSpec]],
        calls: Sequence[Node],
        results: Sequence[Node],
        outputs: Sequence[str],
    ) -> Graph:
        """Takes over the `calls` of a program, which return `results` under the names `outputs`.

        Of `inputs`, and of the program's constants, those that the calls or results use.
        """
        lifted = lifted_tensors(program)
        needed = {*results, *(node for call in calls for node in call.all_input_nodes)}
        used = [(node, spec) for node, spec in inputs if node in needed]
        constants = [node for node in program.graph.nodes if node.name in lifted and node in needed]
        number = {node: i for i, node in enumerate([*(node for node, _ in used), *constants, *calls])}
        values = [node.meta["val"] for node in results]
        return Graph(
            GraphData(
                inputs=[spec for _, spec in used],
                constants=[_constant(_lifted_tensor(program, lifted[node.name])) for node in constants],
                nodes=[
                    Call(
                        op=_op_name(node.target),
                        args=[_encode(arg, number) for arg in node.args],
                        kwargs={key: _encode(arg, number) for key, arg in node.kwargs.items()},
                    )
                    for node in calls
                ],
                results=[number[node] for node in results],
                outputs=[
                    TensorSpec(name=name, role="activation", dtype=dtype_name(value.dtype), shape=list(value.shape))
                    for name, value in zip(outputs, values, strict=True)
                ],
            )
        )

    def embed(self, values: Mapping[int, torch.Tensor]) -> Graph:
        """The graph with these inputs, by position, as constants of its own: of the input's dtype and shape."""
        old = self.data
        kept = [i for i in range(len(old.inputs)) if i not in values]
        own, count = range(len(old.inputs), len(old.inputs) + len(old.constants)), len(old.inputs) + len(old.constants)
        order = [*kept, *values, *own, *range(count, count + len(old.nodes))]
        number = {before: after for after, before in enumerate(order)}
        return Graph(
            GraphData(
                inputs=[old.inputs[i] for i in kept],
                constants=[*(_constant(value) for value in values.values()), *old.constants],
                nodes=[
                    Call(op=call.op, args=_renumber(call.args, number), kwargs=_renumber(call.kwargs, number))
                    for call in old.nodes
                ],
                results=[number[i] for i in old.results],
                outputs=old.outputs,
            )
        )

    def to_module(self) -> GraphModule:
        """The graph as a torch module of the inputs, in order, that returns a tuple.

        Raises ValueError, TypeError or RuntimeError when the data is not that of a graph.
        """
        graph, root = FxGraph(), torch.nn.Module()
        values: list[Node] = [graph.placeholder(f"input_{i}") for i in range(len(self.inputs))]
        for i, constant in enumerate(self.data.constants):
            root.register_buffer(f"constant_{i}", _tensor(constant), persistent=False)
            values.append(graph.get_attr(f"constant_{i}"))
        for call in self.data.nodes:
            function = _resolve(call.op)
            _check_arguments(function, call)
            args = tuple(_decode(arg, values) for arg in call.args)
            kwargs = {key: _decode(arg, values) for key, arg in call.kwargs.items()}
            values.append(graph.call_function(function, args, kwargs))
        graph.output(tuple(_value(values, i) for i in self.data.results))
        return GraphModule(root, graph)

    def export(self) -> tuple[ExportedProgram, tuple[torch.Tensor, ...]]:
        """The graph exported again, with the fake inputs used; free dimensions stay free."""
        slots = Dim("slots", min=2)
        with torch._subclasses.FakeTensorMode():
            examples = tuple(
                torch.empty([64 if size is None else size for size in spec.shape], dtype=getattr(torch, spec.dtype))
                for spec in self.inputs
            )
        dynamic = tuple({i: slots for i, size in enumerate(spec.shape) if size is None} for spec in self.inputs)
        with torch.no_grad():
            return torch.export.export(self.to_module(), examples, dynamic_shapes=dynamic, strict=False), examples


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def lifted_tensors(program: ExportedProgram) -> dict[str, str]:
    """Placeholders that stand for tensors of the traced module's own: name -> where the program keeps it."""
    return {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}


def user_inputs(program: ExportedProgram, inputs: Sequence[TensorSpec]) -> list[tuple[Node, TensorSpec]]:
    """The other placeholders, with what they stand for."""
    lifted = lifted_tensors(program)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder" and node.name not in lifted]
    return list(zip(placeholders, inputs, strict=True))


def returned_nodes(program: ExportedProgram) -> list[Node]:
    """What the program returns."""
    return list(list(program.graph.nodes)[-1].args[0])


def live_nodes(program: ExportedProgram) -> set[Node]:
    """What the outputs or a write to an input depend on."""
    live: set[Node] = set()
    for node in reversed(program.graph.nodes):
        writes = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        if node.op == "output" or writes or node in live:
            live.update([node, *node.all_input_nodes])
    return live


def _op_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    return f"operator.{target.__name__}"


def _resolve(op: str) -> Callable[..., Any]:
    if op in _SYMBOLIC:
        return _SYMBOLIC[op]
    namespace, _, rest = op.partition(".")
    name, _, overload = rest.partition(".")
    if namespace != "aten" or not name.isidentifier() or not overload.isidentifier() or name in _FILE_OPERATORS:
        raise ValueError(f"a graph may only call ATen operators, not {op!r}")
    found = getattr(getattr(torch.ops.aten, name, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise TypeError(f"{op!r} is not an ATen operator")
    return found


def _check_arguments(function: Callable[..., Any], call: Call) -> None:
    """torch.fx makes Python source of a call, names of arguments as they stand: only the operator's own may pass."""
    if isinstance(function, torch._ops.OpOverload):
        names = {argument.name for argument in function._schema.arguments}
        fits = names.issuperset(call.kwargs) and not any(map(keyword.iskeyword, call.kwargs))
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


def _value(values: list[Node], index: int) -> Node:
    if not 0 <= index < len(values):
        raise ValueError(f"there is no value {index} yet, only {len(values)}")
    return values[index]


def _encode(arg: Any, number: dict[Node, int]) -> Any:
    match arg:
        case Node():
            return {"ref": number[arg]}
        case list() | tuple():
            return [_encode(item, number) for item in arg]
        case float() if arg != arg or arg in (float("inf"), float("-inf")):
            return {"float": str(arg)}
        case None | bool() | int() | float() | str():
            return arg
        case torch.dtype() | torch.layout() | torch.memory_format():
            return {"torch": str(arg).removeprefix("torch.")}
        case torch.device():
            return {"device": str(arg)}
    raise TypeError(f"an argument of type {type(arg).__name__} has no place in a graph: {arg!r}")


def _renumber(arg: Any, number: Mapping[int, int]) -> Any:
    match arg:
        case {"ref": int(index)}:
            return {"ref": number[index]}
        case list():
            return [_renumber(item, number) for item in arg]
        case dict():
            return {key: _renumber(item, number) for key, item in arg.items()}
    return arg


def _decode(arg: Any, values: list[Node]) -> Any:
    match arg:
        case {"ref": int(index)}:
            return _value(values, index)
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
            return [_decode(item, values) for item in arg]
        case dict():
            raise TypeError(f"not an argument: {arg!r}")
    return arg


def _lifted_tensor(program: ExportedProgram, target: str) -> torch.Tensor:
    tensor = program.constants.get(target, program.state_dict.get(target))
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"the exported graph lifted {target!r}, which is no tensor")
    return tensor


def _constant(tensor: torch.Tensor) -> Constant:
    flat = tensor.detach().contiguous().cpu()
    data = flat.reshape(-1).view(torch.uint8).numpy().tobytes()
    return Constant(dtype=dtype_name(flat.dtype), shape=list(flat.shape), data=base64.b64encode(data).decode())


def _tensor(constant: Constant) -> torch.Tensor:
    data = bytearray(base64.b64decode(constant.data, validate=True))
    dtype = getattr(torch, constant.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{constant.dtype!r} is not a dtype")
    return torch.frombuffer(data, dtype=dtype).reshape(constant.shape)
