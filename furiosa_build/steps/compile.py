"""compile:BUCKET:KIND: graphs become programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_build.backends.base import Option
from furiosa_build.backends.registry import get_backend
from furiosa_build.steps.base import Inputs, Request, Step

if TYPE_CHECKING:
    from furiosa_build.backends.graph import Graph

GRAPHS = "graphs.json"
CONSTANTS = "constants/"
"""What the names of parameter files begin with."""


class CompileRequest(Request):
    """Graphs to be compiled: the input `graphs.json`, and those under `constants/`.

    Attributes:
        backend: The backend's name.
        isa: The instruction set.
        options: Options of the backend's compiler.
        core_aten: The programs call operators of core ATen only.
        layer_prefixes: What the names of each layer's parameters begin with, where the programs are to hold their
            parameters as constants. None: they are not.
    """

    backend: str
    isa: str
    options: dict[str, Option]
    core_aten: bool = False
    layer_prefixes: list[str] | None = None


class Compile(Step[CompileRequest]):
    """Writes the programs of the graphs, in order, where the backend locates them."""

    name = "compile"
    Request = CompileRequest

    def run(self, request: CompileRequest, inputs: Inputs, output: Path) -> None:
        from furiosa_build.models.partition import CutGraph

        backend, constants = get_backend(request.backend), inputs.under(CONSTANTS).values()
        graphs = CutGraph.model_validate_json(inputs.files[GRAPHS].read_bytes()).graphs
        if request.layer_prefixes is not None:
            graphs = [_embed(graph, constants, request.layer_prefixes) for graph in graphs]
        backend.compile_all(graphs, output, request.isa, inputs.scratch, request.options, request.core_aten)


def _embed(graph: Graph, files: Iterable[Path], prefixes: Sequence[str]) -> Graph:
    import torch
    from safetensors import safe_open

    wanted = {
        position: spec.name if spec.block is None else prefixes[spec.block] + spec.name
        for position, spec in enumerate(graph.inputs)
        if spec.role == "parameter"
    }
    values = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            held = set(stored.keys())
            for position, name in wanted.items():
                if name in held:
                    values[position] = stored.get_tensor(name).view(getattr(torch, graph.inputs[position].dtype))
    return graph.embed(values)
