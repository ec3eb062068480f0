"""compile:BUCKET:KIND: graphs become programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.backends.registry import get_backend

if TYPE_CHECKING:
    from furiosa_build.backends.graph import Graph


def run(request: dict[str, Any], output: Path) -> None:
    """request: `graphs` (path of graphs.json), `backend`, `isa`, `scratch`, `options`, and `constants`: null, or
    `files` (paths of parameter files) and `prefixes` (of the names of each layer's parameters), whose parameters the
    programs are to hold.

    Writes program-N.SUFFIX for graph N.
    """
    from furiosa_build.models.partition import CutGraph

    backend = get_backend(request["backend"])
    graphs = CutGraph.model_validate_json(Path(request["graphs"]).read_bytes()).graphs
    for number, graph in enumerate(graphs):
        program = output / program_name(number, backend.file_suffix)
        whole = graph if request["constants"] is None else _embed(graph, **request["constants"])
        backend.compile(whole, program, request["isa"], Path(request["scratch"]), request["options"])


def _embed(graph: Graph, files: list[str], prefixes: list[str]) -> Graph:
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


def program_name(number: int, suffix: str) -> str:
    """Of the program of a supertask's graph."""
    return f"program-{number}{suffix}"
