"""compile:BUCKET:KIND: graphs become programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from furiosa_build.backends import get_backend


def run(request: dict[str, Any], output: Path) -> None:
    """request: `graphs` (path of graphs.json), `backend`, `isa`, `scratch`, `options`.

    Writes program-N.SUFFIX for graph N.
    """
    from furiosa_build.models.cut import CutGraph

    backend = get_backend(request["backend"])
    graphs = CutGraph.model_validate_json(Path(request["graphs"]).read_bytes()).graphs
    for number, graph in enumerate(graphs):
        program = output / program_name(number, backend.file_suffix)
        backend.compile(graph, program, request["isa"], Path(request["scratch"]), request["options"])


def program_name(number: int, suffix: str) -> str:
    """Of the program of a supertask's graph."""
    return f"program-{number}{suffix}"
