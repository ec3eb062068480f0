"""partition:BUCKET:KIND: one supertask of one bucket, as the graphs that a rank runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from furiosa_build.canonical import canonical_json
from furiosa_build.plan.cuts import Cut

OUTPUT = "graphs.json"


def run(request: dict[str, Any], output: Path) -> None:
    """request: `hf_config`, `schemes`, `cuts`, `ranks`, `role` (first, block, last), `layer`, `bucket` (batch, query,
    context), `first_outputs`, `last_token_only`. Writes graphs.json: a `models.cut.CutGraph`.
    """
    from furiosa_build.models.supertasks import BucketShape, Tracer

    cuts = {name: Cut.model_validate(cut) for name, cut in request["cuts"].items()}
    tracer = Tracer(request["hf_config"], request["schemes"], cuts, request["ranks"])
    shape = BucketShape(*request["bucket"])
    match request["role"]:
        case "first":
            graph = tracer.first(shape, [(layer, name) for layer, name in request["first_outputs"]])
        case "block":
            graph = tracer.block(shape, request["layer"])
        case _:
            graph = tracer.last(shape, request["last_token_only"])
    (output / OUTPUT).write_bytes(canonical_json(graph.model_dump(mode="json")))
