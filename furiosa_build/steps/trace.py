"""partition:BUCKET:KIND: one supertask of one bucket as a graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OUTPUT = "graph.json"


def run(request: dict[str, Any], output: Path) -> None:
    """request: `hf_config`, `schemes`, `role` (first, block, last), `layer`, `bucket` (batch, query, context),
    `first_outputs`, `last_token_only`. Writes graph.json.
    """
    from furiosa_build.models.supertasks import BucketShape, Tracer

    tracer = Tracer(request["hf_config"], request["schemes"])
    shape = BucketShape(*request["bucket"])
    match request["role"]:
        case "first":
            graph = tracer.first(shape, [(layer, name) for layer, name in request["first_outputs"]])
        case "block":
            graph = tracer.block(shape, request["layer"])
        case _:
            graph = tracer.last(shape, request["last_token_only"])
    (output / OUTPUT).write_bytes(graph.to_json())
