"""partition:BUCKET:KIND: a supertask of a bucket, as the graphs that a rank runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.ir.segment import Segment
from furiosa_build.ir.sharding import Cut
from furiosa_build.steps.base import Inputs, Request, Step

OUTPUT = "graphs.json"


class TraceRequest(Request):
    """A supertask to be traced.

    Attributes:
        hf_config: The fields of the model's config.json.
        schemes: The scheme of each quantized parameter, by name.
        cuts: How parameters are divided among ranks, by name.
        ranks: Ranks of a stage.
        segment: What the supertask computes.
        bucket: Batch size, new tokens of each sequence, tokens of context.
        last_token_only: Logits are those of each prompt's last token.
    """

    hf_config: dict[str, Any]
    schemes: dict[str, str]
    cuts: dict[str, Cut]
    ranks: int
    segment: Segment
    bucket: tuple[int, int, int]
    last_token_only: bool


class Trace(Step[TraceRequest]):
    """Writes graphs.json: a `models.partition.CutGraph`."""

    name = "trace"
    Request = TraceRequest

    def run(self, request: TraceRequest, inputs: Inputs, output: Path) -> None:
        from furiosa_build.models.tracing import BucketShape, Tracer

        tracer = Tracer(request.hf_config, request.schemes, request.cuts, request.ranks)
        graph = tracer.trace(BucketShape(*request.bucket), request.segment, request.last_token_only)
        (output / OUTPUT).write_bytes(canonical_json(graph.model_dump(mode="json")))
