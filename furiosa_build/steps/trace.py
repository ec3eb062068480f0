"""partition:BUCKET:KIND: a supertask of a bucket, as the graphs that a rank runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.ir.segment import Segment
from furiosa_build.ir.sharding import Cut

OUTPUT = "graphs.json"


def run(request: dict[str, Any], output: Path) -> None:
    """request: `hf_config`, `schemes`, `cuts`, `ranks`, `segment` (a `plan.kinds.Segment`), `bucket` (batch, query,
    context), `last_token_only`, `decompose`. Writes graphs.json: a `models.cut.CutGraph`.
    """
    from furiosa_build.models.tracing import BucketShape, Tracer

    cuts = {name: Cut.model_validate(cut) for name, cut in request["cuts"].items()}
    tracer = Tracer(request["hf_config"], request["schemes"], cuts, request["ranks"], request["decompose"])
    segment = Segment.model_validate(request["segment"])
    graph = tracer.trace(BucketShape(*request["bucket"]), segment, request["last_token_only"])
    (output / OUTPUT).write_bytes(canonical_json(graph.model_dump(mode="json")))
