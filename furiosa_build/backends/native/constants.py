"""What a lowered graph computes from constants alone is computed when it is compiled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from furiosa_build.backends.graph import lifted_tensor, lifted_tensors

_LARGEST = 1 << 20
"""Elements: larger tensors are computed as the program runs."""
_FILLED = {"full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones"}


def fold(program: ExportedProgram) -> tuple[dict[Node, Tensor], list[Node]]:
    """The nodes that are constants, with what they are, and the calls that are left, in order."""
    lifted = lifted_tensors(program)
    constants: dict[Node, Tensor] = {}
    calls = []
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in lifted:
            constants[node] = lifted_tensor(program, lifted[node.name])
        elif node.op == "call_function":
            folded = _fold(node, constants)
            if folded is None:
                calls.append(node)
            else:
                constants[node] = folded
    return constants, calls


def _fold(node: Node, constants: Mapping[Node, Tensor]) -> Tensor | None:
    value, target = node.meta.get("val"), node.target
    if not isinstance(value, Tensor) or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    if target._opname in _FILLED and not isinstance(_filling(node), Node):
        return torch.full((), _filling(node), dtype=value.dtype).expand(tuple(value.shape))
    if any(given not in constants for given in node.all_input_nodes) or math.prod(value.shape) > _LARGEST:
        return None
    found: Tensor = target(*_given(node.args, constants), **_given(node.kwargs, constants))
    return found


def _filling(node: Node) -> Any:
    """What `full`, `zeros`, `ones` or one of their relatives fills with."""
    name = str(node.target._opname).removeprefix("new_")  # type: ignore[union-attr]
    return 0 if name.startswith("zeros") else 1 if name.startswith("ones") else node.args[-1]


def _given(arguments: Any, constants: Mapping[Node, Tensor]) -> Any:
    return torch.fx.map_arg(arguments, lambda node: constants[node])
