"""package: the artifact's description and manifest, from what the other steps made."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import furiosa_build
from furiosa_build.artifact.schema import (
    ARTIFACT_FILE,
    MANIFEST_FILE,
    Artifact,
    ArtifactMetadata,
    ArtifactVersion,
    FileRecord,
    GeneratorConfig,
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
    TensorSpec,
    artifact_id,
    timeless,
)
from furiosa_build.canonical import canonical_json, digest
from furiosa_build.plan.planner import Bucket, Kind, Plan, pretrained_id
from furiosa_build.steps.fetch import Source


@dataclass(frozen=True)
class BuiltProgram:
    """One compile step's result: the program's file and digest, and the signature of its graph."""

    bucket: Bucket
    kind: Kind
    file: Path
    suffix: str
    record: FileRecord
    graph: Mapping[str, Any]

    @property
    def identity(self) -> str:
        """Equal for programs that are the same library and are called in the same way."""
        return digest([self.record.sha256, self.graph["inputs"], self.graph["outputs"]])


@dataclass(frozen=True)
class Package:
    """A finished artifact, not yet published. `files` says where each file of the manifest is, but artifact.json."""

    artifact: Artifact
    manifest: Manifest
    files: dict[str, Path]


def package(
    plan: Plan,
    programs: list[BuiltProgram],
    parameters: Mapping[str, tuple[Path, FileRecord]],
    source: Source,
    source_digest: str,
    model_files: Mapping[str, tuple[Path, FileRecord]],
) -> Package:
    """Describes the artifact. Every mapping is from a file's name to where it is, and its size and digest."""
    names = _program_names(programs)
    files: dict[str, tuple[Path, FileRecord]] = {}
    for program in programs:
        files[f"programs/{names[program.identity]}{program.suffix}"] = program.file, program.record
    files.update({f"params/{name}": entry for name, entry in parameters.items()})
    files.update({f"model/{name}": entry for name, entry in model_files.items()})
    records = {path: record for path, (_, record) in files.items()}

    draft = _describe(plan, programs, names, sorted(parameters), source, source_digest)
    identity = artifact_id(draft, records)
    artifact = draft.model_copy(update={"metadata": draft.metadata.model_copy(update={"artifact_id": identity})})
    stamped = timeless(artifact)
    records[ARTIFACT_FILE] = file_record(stamped)
    manifest = Manifest(artifact_id=identity, files=dict(sorted(records.items())))
    return Package(artifact, manifest, {path: file for path, (file, _) in files.items()})


def write(built: Package, output: Path) -> None:
    """Writes the package's own two files; artifact.json without the time."""
    (output / ARTIFACT_FILE).write_bytes(timeless(built.artifact))
    (output / MANIFEST_FILE).write_bytes(canonical_json(built.manifest.model_dump(mode="json")))


def copy_model_files(directory: Path | None, source: Source, hf_config: Mapping[str, Any], output: Path) -> None:
    """Writes what the artifact's model/ directory will hold: the config, and the tokenizer's files as they are."""
    from furiosa_build.steps.fetch import model_files

    (output / "config.json").write_bytes(canonical_json(dict(hf_config)))
    for name in model_files(source):
        assert directory is not None
        shutil.copyfile(directory / name, output / name)


def file_record(data: bytes) -> FileRecord:
    """Size and digest of bytes."""
    import hashlib

    return FileRecord(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _program_names(programs: list[BuiltProgram]) -> dict[str, str]:
    """A name for every distinct program: that of the first bucket and kind that use it."""
    names: dict[str, str] = {}
    for program in programs:
        names.setdefault(program.identity, f"{program.bucket.name}.{program.kind.name}")
    return names


def _describe(
    plan: Plan,
    programs: list[BuiltProgram],
    names: Mapping[str, str],
    parameter_files: list[str],
    source: Source,
    source_digest: str,
) -> Artifact:
    spec, buckets = plan.spec, plan.spec.buckets
    last_only = spec.model.calculate_logit_only_for_last_token
    return Artifact(
        metadata=ArtifactMetadata(
            artifact_id="",
            name=spec.name,
            timestamp=0,
            version=ArtifactVersion(
                furiosa_llm=furiosa_build.__version__,
                furiosa_compiler=f"{spec.backend.name} {_torch_release()}",
            ),
        ),
        devices=spec.devices,
        generator_config=GeneratorConfig(
            prefill_buckets=list(buckets.prefill_buckets),
            decode_buckets=list(buckets.decode_buckets),
            max_seq_len_to_capture=buckets.max_seq_len_to_capture,
            paged_attention_num_blocks=buckets.num_blocks,
            paged_attention_block_size=buckets.paged_attention_block_size,
            calculate_logit_only_for_last_token=last_only,
            default_scheduler_config=SchedulerDefaults(**spec.scheduler.model_dump()),
        ),
        hf_config=dict(plan.hf_config),
        model_metadata=ModelMetadata(
            pretrained_id=pretrained_id(spec.model),
            revision=source.revision,
            weights_digest=source_digest,
            seed_for_random_weight=source.seed,
            architecture=plan.outline.architecture,
            dtype=plan.outline.dtype,
            num_hidden_layers=sum(len(block.layers) for block in plan.outline.blocks),
            vocab_size=plan.outline.vocab_size,
            num_parameters=plan.outline.num_parameters,
            quantization=spec.quantization.scheme if plan.schemes() else "none",
        ),
        model_rewriting_config=ModelRewritingConfig(
            use_blockwise_compile=True,
            num_blocks_per_supertask=1,
            do_decompositions_for_model_rewrite=False,
            embed_all_constants_into_graph=False,
            calculate_logit_only_for_last_token=last_only,
        ),
        parallel_config=ParallelConfig(**spec.parallel.model_dump()),
        backend=spec.backend.name,
        target=Target(name=spec.target.name, isa=plan.isa, torch=_torch_release()),
        programs={
            names[p.identity]: Program(
                file=f"programs/{names[p.identity]}{p.suffix}",
                kind=p.kind.name,
                inputs=[TensorSpec.model_validate(spec) for spec in p.graph["inputs"]],
                outputs=[TensorSpec.model_validate(spec) for spec in p.graph["outputs"]],
            )
            for p in reversed(programs)
        },
        pipelines=[_pipeline(plan, bucket, programs, names) for bucket in plan.buckets],
        parameters=[ParameterFiles(stage=0, rank=0, files=[f"params/{name}" for name in parameter_files])],
        kv_cache=[
            KvCacheSpec(layer=layer, stage=0, dtype=plan.outline.dtype, shape_per_slot=block.cache_shape)
            for layer, block in sorted((layer, block) for block in plan.outline.blocks for layer in block.layers)
        ],
    )


def _torch_release() -> str:
    """torch's version without its flavour: `2.13.0` for `2.13.0+cpu`."""
    return version("torch").partition("+")[0]


def _pipeline(plan: Plan, bucket: Bucket, programs: list[BuiltProgram], names: Mapping[str, str]) -> Pipeline:
    own = {program.kind.name: program for program in programs if program.bucket == bucket}
    return Pipeline(
        name=bucket.name,
        phase=bucket.phase,
        batch_size=bucket.batch,
        query_length=bucket.query,
        context_length=bucket.context,
        supertasks=[
            _supertask(plan, own[kind.name], names[own[kind.name].identity], layer)
            for kind, layer in _in_order(plan.kinds)
        ],
    )


def _in_order(kinds: tuple[Kind, ...]) -> Iterator[tuple[Kind, int | None]]:
    """Kinds in the order they run: the first, every layer, the last."""
    yield from ((kind, None) for kind in kinds if kind.role == "first")
    yield from sorted(((k, layer) for k in kinds for layer in k.layers), key=lambda item: item[1])
    yield from ((kind, None) for kind in kinds if kind.role == "last")


def _supertask(plan: Plan, program: BuiltProgram, name: str, layer: int | None) -> Supertask:
    sources = program.kind.outline.inputs if program.kind.outline is not None else {}
    activations = [spec["name"] for spec in program.graph["inputs"] if spec["role"] == "activation"]
    return Supertask(
        kind="comp",
        program=name,
        stage=0,
        ranks=[0],
        inputs={argument: sources.get(argument, argument) for argument in activations},
        outputs=[spec["name"] for spec in program.graph["outputs"]],
        parameter_prefix="" if layer is None else f"{plan.outline.layer_prefix}{layer}.",
        layer=layer,
    )
