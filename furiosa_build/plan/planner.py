"""From a BuildSpec and the model's outline to the steps of the build: a pure function, no I/O, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import PurePath
from typing import Any, Literal

from furiosa_build.plan.cuts import Cut
from furiosa_build.plan.outline import KindOutline, Outline
from furiosa_build.recipe.buckets import Phase, bucket_name
from furiosa_build.recipe.schema import BuildSpec, ModelSpec, ParallelSpec, Scheme

Role = Literal["first", "block", "last"]

# What steps consume of others. What else these make, such as a tokenizer's files, does not make them run again.
_ALL = "*"
_SOURCE = {"fetch": "weights.json"}
_CHECKPOINT = {"quantize": "*.safetensors"}
_ARTIFACT = {"package": "artifact.json"}  # Its id stands for all files but provenance.json.


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
class Kind:
    """Supertasks that share a program in every bucket.

    `schemes` has the quantized parameters, by the names that the program uses; `outline` is that of a block's layers.
    """

    name: str
    role: Role
    signature: str
    layers: tuple[int, ...] = ()
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    outline: KindOutline | None = None


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
    """The steps, in an order in which they can run, and the facts they were made from."""

    spec: BuildSpec
    hf_config: Mapping[str, Any]
    outline: Outline
    isa: str
    buckets: tuple[Bucket, ...]
    kinds: tuple[Kind, ...]
    steps: Mapping[str, Step]

    @property
    def stages(self) -> list[list[int]]:
        """The layers of each pipeline stage."""
        return split_into_stages(sum(len(block.layers) for block in self.outline.blocks), self.spec.parallel)

    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every quantized parameter, by full name."""
        return quantized_parameters(self.spec, self.outline)


def make_plan(spec: BuildSpec, hf_config: Mapping[str, Any], outline: Outline, isa: str) -> Plan:
    """Plans the build. `isa` is the instruction set that programs are compiled for."""
    buckets, kinds = tuple(_buckets(spec)), tuple(_kinds(spec, outline))
    steps = [*_weight_steps(spec, hf_config, outline), *_program_steps(spec, outline, isa, buckets, kinds)]
    last_steps = _artifact_steps(spec, hf_config, outline, steps, isa)
    return Plan(spec, hf_config, outline, isa, buckets, kinds, {step.name: step for step in (*steps, *last_steps)})


def quantized_parameters(spec: BuildSpec, outline: Outline) -> dict[str, Scheme]:
    """Full name -> scheme, of the weights of linear layers that are quantized."""
    schemes = {n: spec.quantization.scheme_of(n) for n, p in outline.parameters.items() if p.linear}
    return {name: scheme for name, scheme in schemes.items() if scheme != "none"}


def split_into_stages(layers: int, parallel: ParallelSpec) -> list[list[int]]:
    """The layers of each stage, in order: as given, or as many for each, the first ones one more if need be."""
    if parallel.num_blocks_per_pp_stage is not None:
        ends = list(accumulate(parallel.num_blocks_per_pp_stage))
        return [list(range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]
    share, more = divmod(layers, parallel.pipeline_parallel_size)
    ends = [(stage + 1) * share + min(stage + 1, more) for stage in range(parallel.pipeline_parallel_size)]
    return [list(range(begin, end)) for begin, end in zip([0, *ends], ends, strict=False)]


def pretrained_id(model: ModelSpec) -> str:
    """The model's name without a machine's directories: a hub id or a relative path as it is, else the last part."""
    path = PurePath(model.model_id_or_path)
    is_place = path.is_absolute() or str(path)[0] in ".~"
    return path.name if is_place and path.name else path.as_posix()


def resolved_recipe(spec: BuildSpec) -> dict[str, Any]:
    """The BuildSpec as the artifact tells of it, without what belongs to a machine or changes no byte.

    Nor the revision: a branch is the commit that it stands for, and `fetch` says which.
    """
    recipe = spec.model_dump(mode="json", exclude={"target": {"memory_gb"}, "model": {"revision"}})
    recipe["model"]["model_id_or_path"] = pretrained_id(spec.model)
    recipe["parallel"]["data_parallel_size"] = spec.data_parallel_size
    return recipe


def _buckets(spec: BuildSpec) -> Iterator[Bucket]:
    for batch, length in spec.buckets.prefill_buckets:
        yield Bucket("prefill", batch, length, length)
    for batch, new, length in spec.append_buckets:
        yield Bucket("append", batch, new, length)
    for batch, length in spec.buckets.compiled_decode_buckets:
        yield Bucket("decode", batch, 1, length)


def _kinds(spec: BuildSpec, outline: Outline) -> Iterator[Kind]:
    schemes = quantized_parameters(spec, outline)

    def of(names: list[str], prefix: str = "") -> dict[str, Scheme]:
        return {name: schemes[prefix + name] for name in names if prefix + name in schemes}

    yield Kind("first", "first", outline.first_signature, schemes=of(outline.first_parameters))
    blocks: dict[tuple[int, str], Kind] = {}
    for index, block in enumerate(outline.blocks):
        for layer in block.layers:
            quantized = of(block.parameters, f"{outline.layer_prefix}{layer}.")
            same = blocks.get((index, repr(quantized)))
            layers = (*(same.layers if same else ()), layer)
            blocks[index, repr(quantized)] = Kind("", "block", block.signature, layers, quantized, block)
    for number, kind in enumerate(blocks.values()):
        name = "block" if len(blocks) == 1 else f"block{number}"
        yield Kind(name, "block", kind.signature, kind.layers, kind.schemes, kind.outline)
    yield Kind("last", "last", outline.last_signature, schemes=of(outline.last_parameters))


def _weight_steps(spec: BuildSpec, hf_config: Mapping[str, Any], outline: Outline) -> Iterator[Step]:
    model, schemes = spec.model, quantized_parameters(spec, outline)
    parameters = {name: p.model_dump() for name, p in outline.parameters.items()}
    seed = model.seed_for_random_weight
    drawn = f"random weights from seed {seed}" if seed is not None else "weights"
    yield Step(
        "fetch",
        "fetch",
        f"find the {drawn} of {pretrained_id(model)} and list them by digest",
        # The architecture is compared with the weights' own config.json.
        reads={
            "architecture": model.architecture,
            **({"seed": seed, "parameters": parameters} if seed is not None else {}),
        },
    )
    scheme = spec.quantization.scheme
    yield Step(
        "quantize",
        "quantize",
        f"quantize {len(schemes)} weights to {scheme}" if schemes else "no quantization: check the weights",
        needs=_SOURCE,
        reads={
            "schemes": schemes,
            "parameters": parameters,
            "architecture": outline.architecture,
            "hf_config": dict(hf_config),
        },
    )
    yield Step(
        "partition:weights",
        "shard",
        f"lay out {len(parameters)} parameters for {_places(spec)}",
        needs=_CHECKPOINT if schemes else {**_SOURCE, **_CHECKPOINT},
        reads={
            "parameters": parameters,
            # Which of them the first and the last stage need, and what belongs to a layer.
            **({"parallel": _shape(spec), "roles": _roles(outline)} if spec.parallel.is_divided else {}),
        },
    )


def _program_steps(
    spec: BuildSpec, outline: Outline, isa: str, buckets: tuple[Bucket, ...], kinds: tuple[Kind, ...]
) -> Iterator[Step]:
    for bucket in buckets:
        for kind in kinds:
            what = f"{kind.name} of {bucket.name}"
            shared = f" ({len(kind.layers)} layers)" if kind.layers else ""
            reads: dict[str, Any] = {
                "role": kind.role,
                "signature": kind.signature,
                "schemes": dict(kind.schemes),
                "bucket": [bucket.batch, bucket.query, bucket.context],
            }
            if spec.parallel.tensor_parallel_size > 1:
                reads["ranks"] = spec.parallel.tensor_parallel_size
                reads["cuts"] = {name: c.model_dump() for name, c in _cuts_of(kind, outline).items()}
            if kind.role == "first":
                reads["outputs"] = outline.first_outputs
            if kind.role == "last":
                reads["last_token_only"] = spec.model.calculate_logit_only_for_last_token
            trace = f"partition:{bucket.name}:{kind.name}"
            yield Step(trace, "trace", f"trace {what}{shared}", reads=reads, bucket=bucket, kind=kind)
            yield Step(
                f"compile:{bucket.name}:{kind.name}",
                "compile",
                f"compile {what}{shared} with {spec.backend.name} for {isa}",
                needs={trace: _ALL},
                reads={"backend": spec.backend.name, "isa": isa, **_options(spec)},
                bucket=bucket,
                kind=kind,
            )


def _artifact_steps(
    spec: BuildSpec, hf_config: Mapping[str, Any], outline: Outline, steps: list[Step], isa: str
) -> Iterator[Step]:
    schemes = quantized_parameters(spec, outline)
    reads = resolved_recipe(spec)
    reads |= {"isa": isa, "hf_config": dict(hf_config), "outline": outline.model_dump(mode="json")}
    needs = {step.name: _ALL for step in steps if step.name != "quantize"}
    yield Step("package", "package", f"publish artifact {spec.name}", needs=needs, reads=reads)
    yield Step(
        "qualify",
        "qualify",
        "load the artifact in a fresh process, generate, compare with the eager reference",
        needs={**_ARTIFACT, **(_CHECKPOINT if schemes else _SOURCE)},
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
    """How the parameters that a kind reads are cut, by the names it uses."""
    if kind.outline is not None:
        names = {name: f"{outline.layer_prefix}{kind.layers[0]}.{name}" for name in kind.outline.parameters}
    else:
        own = outline.first_parameters if kind.role == "first" else outline.last_parameters
        names = {name: name for name in own}
    cuts = {name: outline.parameters[full].cut for name, full in names.items()}
    return {name: cut for name, cut in cuts.items() if cut is not None}


def _options(spec: BuildSpec) -> dict[str, Any]:
    overrides = spec.backend.compiler_config_overrides
    return {"options": overrides} if overrides else {}
