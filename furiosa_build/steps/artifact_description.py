"""The artifact's description and manifest, from what the steps have made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePath
from typing import Any

import furiosa_build
from furiosa_build.artifact.schema import (
    ARTIFACT_FILE,
    DRAFT_DIRECTORY,
    PROVENANCE_FILE,
    Artifact,
    ArtifactMetadata,
    ArtifactVersion,
    FileRecord,
    GeneratorConfig,
    KvCacheSharing,
    KvCacheSpec,
    Manifest,
    ModelMetadata,
    ModelRewritingConfig,
    ParallelConfig,
    ParameterFiles,
    Pipeline,
    Program,
    SchedulerDefaults,
    Supertask,
    Target,
    artifact_id,
    to_json,
)
from furiosa_build.artifact.stages import with_sends
from furiosa_build.backends.base import ProgramLocation
from furiosa_build.core.canonical_json import digest
from furiosa_build.ir.outline import KindOutline
from furiosa_build.ir.tensors import TensorSpec
from furiosa_build.plan.kinds import Kind, Use
from furiosa_build.plan.model import Bucket, ModelPlan
from furiosa_build.steps.provenance import provenance
from furiosa_build.weights.listing import ListedWeights, ModelFiles


@dataclass(frozen=True)
class BuiltProgram:
    """A compile step's result: a program's digest, the signature of its graph, and the collectives that follow it.

    `part` counts the graphs of the supertask; `location` is in the step's output.
    """

    bucket: Bucket
    kind: Kind
    part: int
    location: ProgramLocation
    record: FileRecord
    graph: Mapping[str, Any]
    collectives: list[dict[str, str]]

    @property
    def identity(self) -> str:
        """Equal for programs that are the same library and are called in the same way."""
        entry = [] if self.location.entry is None else [self.location.entry]
        return digest([self.record.sha256, *entry, self.graph["inputs"], self.graph["outputs"]])


@dataclass(frozen=True)
class BuiltModel:
    """What the steps have made of one model: of the artifact's own, or of its draft, with as many KV blocks."""

    model: ModelPlan
    kv_blocks: int
    library: Mapping[str, FileRecord]
    programs: list[BuiltProgram]
    parameters: Mapping[str, FileRecord]
    weights: ListedWeights
    others: ModelFiles


@dataclass(frozen=True)
class Package:
    """A finished artifact, not yet published."""

    artifact: Artifact
    manifest: Manifest
    provenance: dict[str, Any]


def package(
    model: BuiltModel, model_files: Mapping[str, FileRecord], tools: Mapping[str, str], draft: BuiltModel | None = None
) -> Package:
    """Describes the artifact. `model_files` are those of its model/, `tools` has the versions of what made it."""
    records = {f"model/{name}": record for name, record in model_files.items()}
    of_draft = None
    if draft is not None:
        of_draft, draft_records = _describe_with_files(draft, DRAFT_DIRECTORY, {}, None)
        records.update(draft_records)
    artifact, records = _describe_with_files(model, "", records, of_draft)
    records[ARTIFACT_FILE] = file_record(to_json(artifact))
    models = [(built.model, built.weights, built.others) for built in (model, draft) if built is not None]
    record = provenance(models, records, tools)
    records[PROVENANCE_FILE] = file_record(to_json(record))
    manifest = Manifest(artifact_id=artifact.metadata.artifact_id, files=dict(sorted(records.items())))
    return Package(artifact, manifest, record)


def _describe_with_files(
    built: BuiltModel, directory: str, others: Mapping[str, FileRecord], draft: Artifact | None
) -> tuple[Artifact, dict[str, FileRecord]]:
    """A model with its id, and its files, which are in `directory`, with `others` that are described too."""
    names = _program_names(built.programs)
    files = _program_files(built.programs, names, directory)
    records = {files[p.identity]: p.record for p in built.programs}
    records.update({f"{directory}programs/{name}": record for name, record in built.library.items()})
    records.update({f"{directory}params/{name}": record for name, record in built.parameters.items()})
    records.update(others)
    described = _describe(built, directory, names, files, draft)
    metadata = described.metadata.model_copy(update={"artifact_id": artifact_id(described, records)})
    return described.model_copy(update={"metadata": metadata}), records


def file_record(data: bytes) -> FileRecord:
    """Size and digest of bytes."""
    import hashlib

    return FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _program_names(programs: list[BuiltProgram]) -> dict[str, str]:
    """A name for every distinct program: that of the first bucket and kind that use it."""
    names: dict[str, str] = {}
    for program in programs:
        part = f".{program.part}" if program.part else ""
        names.setdefault(program.identity, f"{program.bucket.name}.{program.kind.name}{part}")
    return names


def _program_files(programs: list[BuiltProgram], names: Mapping[str, str], directory: str) -> dict[str, str]:
    """The file of every distinct program: of its own name, or of the first program's that it shares a file with."""
    shared: dict[str, str] = {}
    files = {}
    for program in programs:
        name = names[program.identity]
        if program.location.entry is not None:
            name = shared.setdefault(program.record.sha256, name)
        suffix = PurePath(program.location.file).suffix
        files[program.identity] = f"{directory}programs/{name}{suffix}"
    return files


def _describe(
    built: BuiltModel, directory: str, names: Mapping[str, str], files: Mapping[str, str], draft: Artifact | None
) -> Artifact:
    model, programs, parameter_files = built.model, built.programs, sorted(built.parameters)
    spec, buckets = model.spec, model.spec.buckets
    beams = buckets.kv_cache_sharing_across_beams_config
    last_only = spec.model.calculate_logit_only_for_last_token
    return Artifact(
        metadata=ArtifactMetadata(
            artifact_id="",
            name=spec.name,
            version=ArtifactVersion(
                furiosa_llm=furiosa_build.__version__,
                furiosa_compiler=f"{spec.backend.name} {_torch_release()}",
            ),
        ),
        devices=spec.devices,
        generator_config=GeneratorConfig(
            prefill_buckets=list(buckets.prefill_buckets),
            append_buckets=list(spec.append_buckets),
            decode_buckets=list(buckets.compiled_decode_buckets),
            max_seq_len_to_capture=buckets.max_seq_len_to_capture,
            paged_attention_num_blocks=built.kv_blocks,
            paged_attention_block_size=buckets.paged_attention_block_size,
            calculate_logit_only_for_last_token=last_only,
            output_last_hidden_state=spec.model.output_last_hidden_state,
            kv_cache_sharing_across_beams_config=None if beams is None else KvCacheSharing(**beams.model_dump()),
            num_speculative_tokens=spec.num_speculative_tokens,
            default_scheduler_config=SchedulerDefaults(**spec.scheduler.model_dump()),
        ),
        hf_config=dict(model.hf_config),
        model_metadata=ModelMetadata(
            pretrained_id=model.pretrained_id,
            revision=built.others.revision,
            weights_digest=digest(built.weights.model_dump(mode="json")),
            seed_for_random_weight=built.weights.seed,
            architecture=model.outline.architecture,
            dtype=model.outline.dtype,
            num_hidden_layers=model.outline.num_layers,
            layer_prefix=model.outline.layer_prefix,
            vocab_size=model.outline.vocab_size,
            num_parameters=model.outline.num_parameters,
            quantization=model.quantization,
        ),
        model_rewriting_config=ModelRewritingConfig(
            **spec.rewriting.model_dump(),
            calculate_logit_only_for_last_token=last_only,
        ),
        parallel_config=ParallelConfig(
            tensor_parallel_size=spec.parallel.tensor_parallel_size,
            pipeline_parallel_size=spec.parallel.pipeline_parallel_size,
            data_parallel_size=spec.data_parallel_size,
        ),
        backend=spec.backend.name,
        target=Target(
            name=spec.target.name, num_elements=spec.target.num_elements, isa=model.isa, torch=_torch_release()
        ),
        library=next((f"{directory}programs/{name}" for name in built.library), None),
        programs={
            names[p.identity]: Program(
                file=files[p.identity],
                entry=p.location.entry,
                kind=p.kind.name,
                inputs=[TensorSpec.model_validate(spec) for spec in p.graph["inputs"]],
                outputs=[TensorSpec.model_validate(spec) for spec in p.graph["outputs"]],
            )
            for p in reversed(programs)
        },
        pipelines=[_pipeline(model, bucket, programs, names) for bucket in model.buckets],
        parameters=[
            ParameterFiles(
                stage=stage,
                rank=rank,
                files=[
                    f"{directory}params/{name}"
                    for name in parameter_files
                    if name.startswith(f"stage-{stage}-rank-{rank}-")
                ],
            )
            for stage in range(spec.parallel.pipeline_parallel_size)
            for rank in range(spec.parallel.tensor_parallel_size)
        ],
        kv_cache=[
            _kv_cache(model, layer, block)
            for layer, block in sorted(
                ((layer, block) for block in model.outline.blocks for layer in block.layers), key=lambda item: item[0]
            )
        ],
        draft=draft,
    )


def _torch_release() -> str:
    """torch's version without its flavour: `2.13.0` for `2.13.0+cpu`."""
    return version("torch").partition("+")[0]


def _pipeline(model: ModelPlan, bucket: Bucket, programs: list[BuiltProgram], names: Mapping[str, str]) -> Pipeline:
    parts: dict[str, list[BuiltProgram]] = {}
    for program in programs:
        if program.bucket == bucket:
            parts.setdefault(program.kind.name, []).append(program)
    uses = sorted(((use, kind) for kind in model.kinds[bucket] for use in kind.uses), key=lambda item: item[0].number)
    tasks = [
        task
        for use, kind in uses
        for program in parts[kind.name]
        for task in _supertasks(model, program, names[program.identity], use)
    ]
    return Pipeline(
        name=bucket.name,
        phase=bucket.phase,
        batch_size=bucket.batch,
        query_length=bucket.query,
        context_length=bucket.context,
        supertasks=list(with_sends(tasks)),
    )


def _stage_of(model: ModelPlan, layer: int) -> int:
    return next(stage for stage, layers in enumerate(model.stages) if layer in layers)


def _supertasks(model: ModelPlan, program: BuiltProgram, name: str, use: Use) -> Iterator[Supertask]:
    """A program, and the collectives that follow it."""
    sources = program.kind.sources
    activations = [spec["name"] for spec in program.graph["inputs"] if spec["role"] == "activation"]
    ranks = list(range(model.spec.parallel.tensor_parallel_size))
    yield Supertask(
        kind="comp",
        program=name,
        stage=use.stage,
        ranks=ranks,
        inputs={argument: sources.get(argument, argument) for argument in activations},
        outputs=[spec["name"] for spec in program.graph["outputs"]],
        layers=list(use.layers),
    )
    for found in program.collectives:
        yield Supertask(
            kind="comm",
            op=found["op"],
            stage=use.stage,
            ranks=ranks,
            inputs={found["source"]: found["source"]},
            outputs=[found["result"]],
        )


def _kv_cache(model: ModelPlan, layer: int, block: KindOutline) -> KvCacheSpec:
    keys, values = block.rank_slots(model.ranks, model.outline.dtype, model.spec.buckets.kv_cache_dtype)
    return KvCacheSpec(
        layer=layer,
        stage=_stage_of(model, layer),
        dtype=keys.dtype,
        shape_per_slot=list(keys.shape),
        value_shape_per_slot=None if values == keys else list(values.shape),
    )
