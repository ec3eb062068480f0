"""compile:BUCKET:KIND: a graph becomes a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from furiosa_build.backends import get_backend


def run(request: dict[str, Any], output: Path) -> None:
    """request: `graph` (path of graph.json), `backend`, `isa`, `scratch`. Writes program.SUFFIX."""
    from furiosa_build.backends.graph import Graph

    backend = get_backend(request["backend"])
    graph = Graph.from_json(Path(request["graph"]).read_bytes())
    backend.compile(graph, output / f"program{backend.file_suffix}", request["isa"], Path(request["scratch"]))
