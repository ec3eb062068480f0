"""partition:BUCKET:KIND: a supertask of a bucket, as the graphs that a rank runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.ir.kv_cache import KvCacheDtype
from furiosa_build.ir.segment import Segment
from furiosa_build.ir.sharding import Cut
from furiosa_build.steps.base import BuildState, Entry, Inputs, Likeness, Request, Step, Work

if TYPE_CHECKING:
    from furiosa_build.plan.budget.costs import Costs
    from furiosa_build.plan.budget.durations import KnownStep
    from furiosa_build.plan.planner import PlannedStep, Site

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
        last_hidden_state: What follows the last layer gives the hidden states that it makes logits of, too.
        kv_cache_dtype: What KV caches hold.
    """

    hf_config: dict[str, Any]
    schemes: dict[str, str]
    cuts: dict[str, Cut]
    ranks: int
    segment: Segment
    bucket: tuple[int, int, int]
    last_token_only: bool
    last_hidden_state: bool
    kv_cache_dtype: KvCacheDtype = "auto"


class Trace(Step[TraceRequest]):
    """Writes graphs.json: a `models.partition.CutGraph`."""

    name = "trace"
    label = "partition"
    Request = TraceRequest
    scope = "program"
    packages = ("torch", "transformers")
    uses_schemes = True
    product = "programs"

    def plan(self, site: Site) -> Entry:
        bucket, kind = site.program
        return Entry(
            f"partition:{bucket.name}:{kind.name}",
            f"trace {site.program_text}",
            needs={},
            reads=_reads(site),
        )

    def request(self, step: PlannedStep, state: BuildState) -> TraceRequest:
        model, (bucket, kind) = step.model, step.site.program
        return TraceRequest(
            hf_config=dict(model.hf_config),
            schemes=dict(model.schemes),
            cuts={name: p.cut for name, p in model.outline.parameters.items() if p.cut is not None},
            ranks=model.ranks,
            segment=kind.segment,
            bucket=(bucket.batch, bucket.query, bucket.context),
            last_token_only=model.spec.model.calculate_logit_only_for_last_token,
            last_hidden_state=model.spec.model.output_last_hidden_state,
            kv_cache_dtype=model.spec.buckets.kv_cache_dtype,
        )

    def work(self, step: PlannedStep, costs: Costs) -> Work:
        return Work(0, costs.of(step).graph)

    def likeness(self, step: KnownStep) -> Likeness:
        return Likeness((step.role, bool(step.reads["schemes"])))

    def run(self, request: TraceRequest, inputs: Inputs, output: Path) -> None:
        from furiosa_build.models.tracing import BucketShape, Tracer

        tracer = Tracer(request.hf_config, request.schemes, request.cuts, request.ranks, request.kv_cache_dtype)
        shape = BucketShape(*request.bucket)
        graph = tracer.trace(shape, request.segment, request.last_token_only, request.last_hidden_state)
        (output / OUTPUT).write_bytes(canonical_json(graph.model_dump(mode="json")))


def _reads(site: Site) -> dict[str, Any]:
    """What shapes a graph. Not which layers it is for: those of a kind trace to the same."""
    model, (bucket, kind) = site.model, site.program
    outline, segment = model.outline, kind.segment
    reads: dict[str, Any] = {
        "segment": segment.model_dump(mode="json", exclude={"layers"}),
        "signatures": [
            *([outline.first_signature] if segment.first else []),
            *(block.outline.signature for block in kind.blocks),
            *([outline.last_signature] if segment.last else []),
        ],
        "schemes": {**kind.schemes, **{f"{i}.{n}": s for i, b in enumerate(kind.blocks) for n, s in b.schemes.items()}},
        "bucket": [bucket.batch, bucket.query, bucket.context],
    }
    if kind.blocks and model.spec.buckets.kv_cache_dtype != "auto":
        reads["kv_cache_dtype"] = model.spec.buckets.kv_cache_dtype
    if model.ranks > 1:
        reads["ranks"] = model.ranks
        reads["cuts"] = {name: cut.model_dump() for name, cut in model.cuts_of(kind).items()}
    if segment.last:
        reads["last_token_only"] = model.spec.model.calculate_logit_only_for_last_token
        if model.spec.model.output_last_hidden_state:
            reads["last_hidden_state"] = True
    return reads
