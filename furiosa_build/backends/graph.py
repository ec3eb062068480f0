"""Graph: what partition hands to a backend. A flat list of calls of operators, as canonical JSON.

Plain data on purpose: reading one runs no code (`torch.export.load` evaluates expressions), equal graphs are equal
bytes, and a person can diff two. Values are numbered: inputs first, then constants, then one number a node.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.ir.graph import Call, Constant, GraphData
from furiosa_build.ir.tensors import TensorSpec


@dataclass(frozen=True)
class Graph:
    """A traced supertask: typed inputs, calls of operators, typed outputs."""

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
    def from_exported(
        program: ExportedProgram, inputs: Sequence[TensorSpec], outputs: Sequence[str], keeps_inputs: bool = False
    ) -> Graph:
        """Takes over an exported program whose user inputs are `inputs`, in order, and names its outputs.

        What no output depends on is left out: dead calls, checks that only repeat what the types say, and, unless
        `keeps_inputs`, inputs.
        """
        live = live_nodes(program)
        calls = [node for node in program.graph.nodes if node.op == "call_function" and node in live]
        own, results = user_inputs(program, inputs), returned_nodes(program)
        return Graph.from_nodes(program, own, calls, results, outputs, keeps_inputs)

    @staticmethod
    def from_nodes(
        program: ExportedProgram,
        inputs: Sequence[tuple[Node, TensorSpec]],
        calls: Sequence[Node],
        results: Sequence[Node],
        outputs: Sequence[str],
        keeps_inputs: bool = False,
    ) -> Graph:
        """Takes over the `calls` of a program, which return `results` under the names `outputs`.

        The program's constants and, unless `keeps_inputs`, `inputs` are those that the calls or results use.
        """
        lifted = lifted_tensors(program)
        needed = {*results, *(node for call in calls for node in call.all_input_nodes)}
        used = [(node, spec) for node, spec in inputs if keeps_inputs or node in needed]
        constants = [node for node in program.graph.nodes if node.name in lifted and node in needed]
        number = {node: i for i, node in enumerate([*(node for node, _ in used), *constants, *calls])}
        values = [node.meta["val"] for node in results]
        return Graph(
            GraphData(
                inputs=[spec for _, spec in used],
                constants=[_constant(lifted_tensor(program, lifted[node.name])) for node in constants],
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


def export_module(
    module: torch.nn.Module, inputs: Sequence[TensorSpec]
) -> tuple[ExportedProgram, tuple[torch.Tensor, ...]]:
    """A module that takes tensors as `inputs` says, exported, with the fake inputs used; free dimensions stay free.

    Operators stay as they are called: nothing is decomposed, and what is written in place is.
    """
    slots = Dim("slots", min=2)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        examples = tuple(
            torch.empty([64 if size is None else size for size in spec.shape], dtype=getattr(torch, spec.dtype))
            for spec in inputs
        )
    dynamic = tuple({i: slots for i, size in enumerate(spec.shape) if size is None} for spec in inputs)
    with torch.no_grad():
        return torch.export.export(module, examples, dynamic_shapes=(dynamic,), strict=False), examples


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
        if node.op == "output" or written_arguments(node) or node in live:
            live.update([node, *node.all_input_nodes])
    return live


def written_arguments(node: Node) -> list[Any]:
    """The arguments of a call that the operator writes in place."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
        return []
    arguments = node.target._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | dict(node.kwargs)
    return [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _op_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    return f"operator.{target.__name__}"


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


def lifted_tensor(program: ExportedProgram, target: str) -> torch.Tensor:
    """A tensor of the traced module's own, by where the program keeps it."""
    tensor = program.constants.get(target, program.state_dict.get(target))
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"the exported graph lifted {target!r}, which is not a tensor")
    return tensor


def _constant(tensor: torch.Tensor) -> Constant:
    flat = tensor.detach().contiguous().cpu()
    data = flat.reshape(-1).view(torch.uint8).numpy().tobytes()
    return Constant(dtype=dtype_name(flat.dtype), shape=list(flat.shape), data=base64.b64encode(data).decode())
