"""From a BuildSpec and the model's outline to the steps of the build: a pure function, no I/O, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import PurePath
from typing import Any, Literal

from furiosa_build.ir.outline import Outline
from furiosa_build.ir.sharding import Cut
from furiosa_build.ir.stages import split_layers
from furiosa_build.plan.kinds import Kind, find_kinds, outer_parameters
from furiosa_build.plan.kv_blocks import KvBlocks, Loaded, find_kv_blocks
from furiosa_build.quant.compressed_tensors import QuantizedCheckpoint
from furiosa_build.quant.scheme import summary
from furiosa_build.recipe.schema import BuildSpec, ModelSpec, ParallelSpec, Phase, bucket_name

# What steps consume of others. What else these make, such as a tokenizer's files, does not make them run again.
_ALL = "*"
_SOURCE = {"fetch": "weights.json"}
_CHECKPOINT = {"quantize": "*.safetensors"}
_ARTIFACT = {"package": "artifact.json"}  # Its id stands for all files but provenance.json.

DRAFT = "draft:"
"""What the names of a draft model's steps begin with, in the plan of the artifact that it is part of."""


@dataclass(frozen=True)
class Bucket:
    """A static shape that is compiled: `query` new tokens of each of `batch` sequences over a context of `context`."""

    phase: Phase
    batch: int
    query: int
    context: int

    @property
    def name(self) -> str:
        """Such as `decode-4x512`, `append-1x64x512`."""
        new = (self.query,) if self.phase == "append" else ()
        return bucket_name(self.phase, (self.batch, *new, self.context))


@dataclass(frozen=True)
class Step:
    """One node of the build graph.

    Attributes:
        name: The doit task's name, such as `compile:decode-1x512:block`.
        action: Kind of step; all steps of a kind run the same code.
        description: One line for listings.
        needs: Steps whose outputs it consumes, and which files of them: a shell pattern.
        reads: What it reads of the BuildSpec and the outline: part of its key.
    """

    name: str
    action: Literal["fetch", "quantize", "shard", "trace", "compile", "package", "qualify"]
    description: str
    needs: Mapping[str, str] = field(default_factory=dict)
    reads: Mapping[str, Any] = field(default_factory=dict)
    bucket: Bucket | None = None
    kind: Kind | None = None


@dataclass(frozen=True)
class Plan:
    """The steps, in an order in which they can run, and the facts they were made from.

    `checkpoint` describes the quantized weights that are taken, if the build does not quantize them itself. `draft` is
    the plan of the draft model by itself; what of its steps goes into this artifact is among `steps` too, as
    `draft:NAME`.
    """

    spec: BuildSpec
    hf_config: Mapping[str, Any]
    outline: Outline
    isa: str
    buckets: tuple[Bucket, ...]
    kinds: Mapping[Bucket, tuple[Kind, ...]]
    kv_blocks: KvBlocks
    steps: Mapping[str, Step]
    checkpoint: QuantizedCheckpoint | None = None
    draft: Plan | None = None

    @property
    def models(self) -> tuple[Plan, ...]:
        """This one, and that of the draft model if there is one."""
        return (self,) if self.draft is None else (self, self.draft)

    def origin(self, step: Step) -> tuple[Plan, Step]:
        """The plan of the model that a step is for, and the step as that has it."""
        if self.draft is None or not step.name.startswith(DRAFT):
            return self, step
        return self.draft, self.draft.steps[step.name.removeprefix(DRAFT)]

    @property
    def stages(self) -> list[list[int]]:
        """The layers of each pipeline stage."""
        return _stages(self.spec, self.outline)

    def schemes(self) -> dict[str, str]:
        """The scheme (`quant.scheme`) of every quantized parameter, by full name."""
        return quantized_parameters(self.spec, self.outline, self.checkpoint)

    @property
    def loaded(self) -> Loaded:
        """What memory is needed for."""
        return Loaded(self.spec, self.outline, self.stages, self.schemes())

    @property
    def quantization(self) -> str:
        """The schemes that quantized parameters have, such as `fp8` or `fp8+int8`, or `none`."""
        return summary(self.schemes().values())

    @property
    def writes_checkpoint(self) -> bool:
        """Whether `quantize` writes weights; else it checks those that there are."""
        return self.checkpoint is None and bool(self.schemes())


def make_plan(
    spec: BuildSpec,
    hf_config: Mapping[str, Any],
    outline: Outline,
    isa: str,
    checkpoint: QuantizedCheckpoint | None = None,
    draft: Plan | None = None,
) -> Plan:
    """Plans the build.

    Args:
        spec: What is built.
        hf_config: The fields of the model's config.json.
        outline: Of that model.
        isa: The instruction set that programs are compiled for.
        checkpoint: The quantized weights that the spec takes, if it does.
        draft: The plan of the draft model that the artifact has as well.
    """
    schemes, stages = quantized_parameters(spec, outline, checkpoint), _stages(spec, outline)
    buckets, taken = tuple(_buckets(spec)), checkpoint is not None
    kinds = {b: find_kinds(outline, schemes, stages, spec.rewriting, _slices(spec, b)) for b in buckets}
    steps = [
        *_weight_steps(spec, hf_config, outline, schemes, taken),
        *_program_steps(spec, outline, isa, kinds),
    ]
    model = Loaded(spec, outline, stages, schemes)
    blocks = find_kv_blocks(model, None if draft is None else draft.loaded)
    if draft is not None:
        draft = _as_draft(draft, blocks)
        steps += _draft_steps(draft)
    last_steps = _artifact_steps(spec, hf_config, outline, schemes, taken, steps, isa, blocks, draft)
    by_name = {step.name: step for step in (*steps, *last_steps)}
    return Plan(spec, hf_config, outline, isa, buckets, kinds, blocks, by_name, checkpoint, draft)


def quantized_parameters(spec: BuildSpec, outline: Outline, checkpoint: QuantizedCheckpoint | None) -> dict[str, str]:
    """Full name -> scheme, of the weights of linear layers that are quantized."""
    scheme_of = spec.quantization.scheme_of if checkpoint is None else checkpoint.scheme_of
    schemes = {name: scheme_of(name) for name, p in outline.parameters.items() if p.linear}
    return {name: scheme for name, scheme in schemes.items() if scheme != "none"}


def split_into_stages(layers: int, parallel: ParallelSpec) -> list[list[int]]:
    """The layers of each stage, in order: as given, or as many for each, the first ones one more if need be."""
    if parallel.num_blocks_per_pp_stage is not None:
        ends = list(accumulate(parallel.num_blocks_per_pp_stage))
        return [list(range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]
    return [list(part) for part in split_layers(layers, parallel.pipeline_parallel_size)]


def _stages(spec: BuildSpec, outline: Outline) -> list[list[int]]:
    return split_into_stages(outline.num_layers, spec.parallel)


def pretrained_id(model: ModelSpec) -> str:
    """The model's name without a machine's directories: a hub id or a relative path as it is, else the last part."""
    return _without_place(model.model_id_or_path)


def _without_place(name: str) -> str:
    path = PurePath(name)
    is_place = path.is_absolute() or str(path)[0] in ".~"
    return path.name if is_place and path.name else path.as_posix()


def resolved_recipe(spec: BuildSpec) -> dict[str, Any]:
    """The BuildSpec as the artifact tells of it, without what belongs to a machine.

    Nor the revision: a branch is the commit that it stands for, and `fetch` says which. Nor where parameters lie, and
    how much memory there is: the number of KV blocks that may follow from it stands in the artifact. Nor, without a
    draft model, that there is none.
    """
    recipe = spec.model_dump(mode="json", exclude={"target": {"memory_gb"}, "model": {"revision", "param_file_path"}})
    recipe["model"]["model_id_or_path"] = pretrained_id(spec.model)
    if (path := spec.quantization.quantize_artifact_path) is not None:
        recipe["quantization"]["quantize_artifact_path"] = _without_place(path)
    recipe["parallel"]["data_parallel_size"] = spec.data_parallel_size
    if spec.speculative.recipe is None:
        del recipe["speculative"]
    else:
        recipe["speculative"]["num_speculative_tokens"] = spec.num_speculative_tokens
    return recipe


def _buckets(spec: BuildSpec) -> Iterator[Bucket]:
    for batch, length in spec.buckets.prefill_buckets:
        yield Bucket("prefill", batch, length, length)
    for batch, new, length in spec.append_buckets:
        yield Bucket("append", batch, new, length)
    for batch, length in spec.buckets.compiled_decode_buckets:
        yield Bucket("decode", batch, 1, length)


def _slices(spec: BuildSpec, bucket: Bucket) -> bool:
    return spec.rewriting.add_prefill_last_block_slice and bucket.phase != "decode" and bucket.query > 1


def _weight_steps(
    spec: BuildSpec, hf_config: Mapping[str, Any], outline: Outline, schemes: Mapping[str, str], taken: bool
) -> Iterator[Step]:
    """`taken`: quantized weights are there already."""
    model, path = spec.model, spec.quantization.quantize_artifact_path
    checkpoint = None if path is None else _without_place(path)
    parameters = {name: p.model_dump() for name, p in outline.parameters.items()}
    seed = model.seed_for_random_weight
    drawn = f"random weights from seed {seed}" if seed is not None else "weights"
    of = pretrained_id(model) if checkpoint is None else f"{pretrained_id(model)}, quantized in {checkpoint},"
    yield Step(
        "fetch",
        "fetch",
        f"find the {drawn} of {of} and list them by digest",
        # The architecture is compared with the weights' own config.json.
        reads={
            "architecture": model.architecture,
            **({"seed": seed, "parameters": parameters} if seed is not None else {}),
        },
    )
    scheme = summary(schemes.values())
    own = f"quantize {len(schemes)} weights to {scheme}" if schemes else "no quantization: check the weights"
    yield Step(
        "quantize",
        "quantize",
        own if checkpoint is None else f"{checkpoint} is quantized: check its {len(schemes)} {scheme} weights",
        needs=_SOURCE,
        reads={
            "schemes": schemes,
            **({"taken": True} if taken else {}),
            "parameters": parameters,
            "architecture": outline.architecture,
            "hf_config": dict(hf_config),
        },
    )
    yield Step(
        "partition:weights",
        "shard",
        f"lay out {len(parameters)} parameters for {_places(spec)}",
        needs=_CHECKPOINT if schemes and not taken else {**_SOURCE, **_CHECKPOINT},
        reads={
            "parameters": parameters,
            **({"schemes": schemes} if taken else {}),
            # Which of them the first and the last stage need, and what belongs to a layer.
            **({"parallel": _shape(spec), "roles": _roles(outline)} if spec.parallel.is_divided else {}),
        },
    )


def _program_steps(
    spec: BuildSpec, outline: Outline, isa: str, kinds: Mapping[Bucket, tuple[Kind, ...]]
) -> Iterator[Step]:
    embeds = spec.rewriting.embed_all_constants_into_graph
    for bucket, kind in ((bucket, kind) for bucket, group in kinds.items() for kind in group):
        what = f"{kind.name} of {bucket.name}"
        shared = f" ({len(kind.layers)} layers)" if kind.layers else ""
        trace = f"partition:{bucket.name}:{kind.name}"
        reads = _trace_reads(spec, outline, bucket, kind)
        yield Step(trace, "trace", f"trace {what}{shared}", reads=reads, bucket=bucket, kind=kind)
        [first, *_] = kind.uses
        parameters = f"stage-{first.stage}-*"
        yield Step(
            f"compile:{bucket.name}:{kind.name}",
            "compile",
            f"compile {what}{shared} with {spec.backend.name} for {isa}",
            needs={trace: _ALL, **({"partition:weights": parameters} if embeds else {})},
            reads={
                "backend": spec.backend.name,
                "isa": isa,
                **_options(spec),
                **({"core_aten": True} if spec.rewriting.do_decompositions_for_model_rewrite else {}),
                **({"constants_of": first.layers} if embeds else {}),
            },
            bucket=bucket,
            kind=kind,
        )


def _trace_reads(spec: BuildSpec, outline: Outline, bucket: Bucket, kind: Kind) -> dict[str, Any]:
    """What shapes a graph. Not which layers it is for: those of a kind trace to the same."""
    segment = kind.segment
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
    if spec.parallel.tensor_parallel_size > 1:
        reads["ranks"] = spec.parallel.tensor_parallel_size
        reads["cuts"] = {name: c.model_dump() for name, c in _cuts_of(kind, outline).items()}
    if segment.last:
        reads["last_token_only"] = spec.model.calculate_logit_only_for_last_token
    return reads


def _as_draft(draft: Plan, blocks: KvBlocks) -> Plan:
    """With as many KV blocks as the model has: a sequence takes as many of each."""
    package = draft.steps["package"]
    counted = replace(package, reads={**package.reads, "kv_blocks": blocks.count})
    return replace(draft, kv_blocks=blocks, steps={**draft.steps, "package": counted})


def _draft_steps(draft: Plan) -> Iterator[Step]:
    """Those that a build of the draft model has, but for its artifact."""
    for step in draft.steps.values():
        if step.action not in ("package", "qualify"):
            needs = {f"{DRAFT}{name}": files for name, files in step.needs.items()}
            yield replace(step, name=f"{DRAFT}{step.name}", needs=needs)


def _artifact_steps(
    spec: BuildSpec,
    hf_config: Mapping[str, Any],
    outline: Outline,
    schemes: Mapping[str, str],
    taken: bool,
    steps: list[Step],
    isa: str,
    blocks: KvBlocks,
    draft: Plan | None,
) -> Iterator[Step]:
    reads = {**resolved_recipe(spec), "kv_blocks": blocks.count}
    reads |= {"isa": isa, "hf_config": dict(hf_config), "outline": outline.model_dump(mode="json")}
    if draft is not None:
        reads["draft"] = draft.steps["package"].reads
    needs = {step.name: _ALL for step in steps if step.action != "quantize"}
    yield Step("package", "package", f"publish artifact {spec.name}", needs=needs, reads=reads)
    yield Step(
        "qualify",
        "qualify",
        "load the artifact in a fresh process, generate, compare with the eager reference",
        needs={**_ARTIFACT, **(_CHECKPOINT if schemes and not taken else _SOURCE)},
        reads={
            "schemes": schemes,
            "parameters": {name: parameter.model_dump() for name, parameter in outline.parameters.items()},
            "hf_config": dict(hf_config),
        },
    )


def _ranks_and_stages(spec: BuildSpec) -> tuple[int, int]:
    return spec.parallel.tensor_parallel_size, spec.parallel.pipeline_parallel_size


def _shape(spec: BuildSpec) -> list[int]:
    return [*_ranks_and_stages(spec), *(spec.parallel.num_blocks_per_pp_stage or ())]


def _places(spec: BuildSpec) -> str:
    ranks, stages = _ranks_and_stages(spec)
    return f"{stages} stages of {ranks} ranks" if spec.parallel.is_divided else "stage 0, rank 0"


def _roles(outline: Outline) -> dict[str, Any]:
    return {
        "layer_prefix": outline.layer_prefix,
        "first": outline.first_parameters,
        "last": outline.last_parameters,
    }


def _cuts_of(kind: Kind, outline: Outline) -> dict[str, Cut]:
    """How the parameters that a kind reads are cut: those of a layer by its number among them."""
    segment = kind.segment
    names = {name: name for name in outer_parameters(segment, outline)}
    for number, (layer, block) in enumerate(zip(segment.layers, kind.blocks, strict=True)):
        names |= {f"{number}.{n}": f"{outline.layer_prefix}{layer}.{n}" for n in block.outline.parameters}
    cuts = {name: outline.parameters[full].cut for name, full in names.items()}
    return {name: cut for name, cut in cuts.items() if cut is not None}


def _options(spec: BuildSpec) -> dict[str, Any]:
    overrides = spec.backend.compiler_config_overrides
    return {"options": overrides} if overrides else {}
