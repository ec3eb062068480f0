"""What an artifact is, as text for a person."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from furiosa_build.artifact.schema import ARTIFACT_FILE, DRAFT_DIRECTORY, Artifact, KvCacheSpec, ModelMetadata
from furiosa_build.core.text import count_text, short_path, size_text
from furiosa_build.ir.dtypes import ITEMSIZE
from furiosa_build.ir.kv_cache import kv_cache_dtype_of
from furiosa_build.plan.budget.placement import Element, element_name
from furiosa_build.plan.budget.sizes import SCRATCH_BLOCKS
from furiosa_build.ui.lines import placement_lines, random_note


def result_text(directory: Path) -> str:
    """What has been built: path, size, and how it qualified."""
    artifact = Artifact.model_validate_json((directory / ARTIFACT_FILE).read_bytes())
    return "\n".join(
        [
            f"artifact   {short_path(directory)} ({size_text(artifact_size(directory))})",
            f"qualified  {qualification_text(directory)}",
            *random_note(artifact.model_metadata.seed_for_random_weight),
            *(f"runs on    {line}" for line in list(placement_lines(_artifact_placement(artifact, directory)))[:1]),
        ]
    )


def artifact_text(artifact: Artifact, directory: Path) -> str:
    """What an artifact is, for `furiosa-build inspect`."""
    meta, model, config = artifact.metadata, artifact.model_metadata, artifact.generator_config
    scheduler, beams = config.default_scheduler_config, config.kv_cache_sharing_across_beams_config
    sizes = {
        part: sum(f.stat().st_size for f in (directory / part).rglob("*") if f.is_file())
        for part in ("params", "programs", "model", DRAFT_DIRECTORY)
    }
    more = f", draft model {size_text(sizes[DRAFT_DIRECTORY])}" if artifact.draft else ""
    parallel = artifact.parallel_config
    lines = [
        f"artifact      {meta.name} {meta.artifact_id[:12]}, schema {artifact.schema_version}",
        f"made by       furiosa_build {meta.version.furiosa_llm}, {meta.version.furiosa_compiler}, "
        f"{datetime.fromtimestamp(meta.timestamp, UTC):%Y-%m-%d %H:%M} UTC",
        f"model         {_of_model(model)}",
        *(f"              {line}" for line in random_note(model.seed_for_random_weight)),
        f"quantization  {model.quantization}",
        *_draft_of_artifact(artifact),
        f"devices       {artifact.devices}: tensor_parallel_size={parallel.tensor_parallel_size}, "
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}, data_parallel_size={parallel.data_parallel_size}",
        *placement_lines(_artifact_placement(artifact, directory)),
        f"target        {artifact.target.name}: instruction set {artifact.target.isa}, torch {artifact.target.torch}",
        f"buckets       prefill {_sizes(config.prefill_buckets)}; "
        f"{f'append {_sizes(config.append_buckets)}; ' if config.append_buckets else ''}"
        f"decode {_sizes(config.decode_buckets)}; "
        f"sequences up to {config.max_seq_len_to_capture} tokens",
        *([f"beam search   {beams.beam_width} beams of up to {beams.max_new_tokens} tokens"] if beams else []),
        f"KV cache      {config.paged_attention_num_blocks} blocks of {config.paged_attention_block_size} tokens, "
        f"{size_text(_kv_bytes(artifact))}{_codes_note(artifact)}",
        f"scheduler     max_processing_samples={scheduler.max_processing_samples}, "
        f"spare_blocks_ratio={scheduler.spare_blocks_ratio}, is_offline={scheduler.is_offline}, "
        f"prefill_chunk_size={scheduler.prefill_chunk_size}",
        f"size          {size_text(artifact_size(directory))}: parameters {size_text(sizes['params'])}, programs "
        f"{size_text(sizes['programs'])}, model files {size_text(sizes['model'])}{more}",
        "programs",
        *_program_lines(artifact, directory),
        *(["programs of the draft", *_program_lines(artifact.draft, directory)] if artifact.draft else []),
        f"qualified     {qualification_text(directory.resolve())}",
    ]
    return "\n".join(lines)


def _of_model(model: ModelMetadata) -> str:
    revision = f" at {model.revision}" if model.revision else ""
    return (
        f"{model.pretrained_id}{revision} ({model.architecture}, {model.num_hidden_layers} layers, "
        f"{count_text(model.num_parameters)} parameters, {model.dtype})"
    )


def _draft_of_artifact(artifact: Artifact) -> Iterator[str]:
    if (draft := artifact.draft) is None:
        return
    proposed = artifact.generator_config.num_speculative_tokens
    yield f"draft         {draft.metadata.name} {draft.metadata.artifact_id[:12]}: proposes {proposed} tokens at a time"
    yield f"              {_of_model(draft.model_metadata)}, quantization {draft.model_metadata.quantization}"
    yield from (f"              {line}" for line in random_note(draft.model_metadata.seed_for_random_weight))


def _program_lines(artifact: Artifact, directory: Path) -> Iterator[str]:
    uses = Counter((pipeline.name, task.program) for pipeline in artifact.pipelines for task in pipeline.supertasks)
    for name, program in artifact.programs.items():
        used_by = ", ".join(f"{n} x in {pipeline}" for (pipeline, p), n in uses.items() if p == name)
        size = (directory / program.file).stat().st_size
        yield f"  {name:28} {program.kind:8} {size_text(size):>10}  {used_by}"
    if artifact.library is not None:
        size = (directory / artifact.library).stat().st_size
        yield f"  {Path(artifact.library).name:28} {'library':8} {size_text(size):>10}  called by all of them"


def artifact_size(directory: Path) -> int:
    """Bytes of all files of an artifact."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _artifact_placement(artifact: Artifact, directory: Path) -> list[Element]:
    """The elements as `placement` plans them, from the artifact's files."""
    parallel = artifact.parallel_config
    of_replica = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    found = []
    for number in range(of_replica * parallel.data_parallel_size):
        replica, place = divmod(number, of_replica)
        stage, rank = divmod(place, parallel.tensor_parallel_size)
        layers = [spec.layer for spec in artifact.kv_cache if spec.stage == stage]
        name, device = element_name(artifact.devices, artifact.target.num_elements, number)
        held = [_held(model, place, directory) for model in (artifact, artifact.draft) if model is not None]
        parameters, kv_cache = (sum(each) for each in zip(*held, strict=True))
        found.append(Element(name, device, replica, stage, rank, (layers[0], layers[-1]), parameters, kv_cache))
    return found


def _held(artifact: Artifact, place: int, directory: Path) -> tuple[int, int]:
    """Bytes of the parameters and of the KV cache that element `place` of a replica has of a model."""
    config = artifact.generator_config
    slots = (config.paged_attention_num_blocks + SCRATCH_BLOCKS) * config.paged_attention_block_size
    where = divmod(place, artifact.parallel_config.tensor_parallel_size)
    files = [file for group in artifact.parameters if (group.stage, group.rank) == where for file in group.files]
    caches = [spec for spec in artifact.kv_cache if spec.stage == where[0]]
    return sum((directory / file).stat().st_size for file in files), slots * sum(map(_slot_bytes, caches))


def qualification_text(directory: Path) -> str:
    """How the artifact in a directory has qualified."""
    path = directory.with_suffix(".qualify.json")
    if not path.is_file():
        return "not known"
    figures = json.loads(path.read_bytes())
    accepted = figures.get("draft_acceptance")
    more = "" if accepted is None else f"; {accepted:.0%} of the draft's tokens accepted"
    if others := figures.get("tokens_by_other_rounding"):
        more += f"; {others} of the tokens as transformers has them when it rounds otherwise"
    if "quantization_kl_divergence" in figures:
        names = ("kl_divergence", "top1_agreement", "perplexity", "published_perplexity")
        divergence, agreement, perplexity, published = (figures[f"quantization_{name}"] for name in names)
        more += (
            f"; against the published model: KL divergence {divergence:.2g}, top-1 agreement {agreement:.0%}, "
            f"perplexity {perplexity:.4g} (published: {published:.4g})"
        )
    return (
        f"{figures['tokens']} tokens, top-1 agreement {figures['top1_agreement']:.0%}, largest logit difference "
        f"{figures['largest_logit_difference']:.2g} (allowed {figures['allowed_logit_difference']:.2g}){more}"
    )


def _codes_note(artifact: Artifact) -> str:
    asked = kv_cache_dtype_of(artifact.kv_cache[0].dtype)
    return "" if asked == "auto" else f", of {asked}"


def _kv_bytes(artifact: Artifact) -> int:
    """Bytes of the KV caches of the model and of a draft, of all replicas."""
    config = artifact.generator_config
    slots = (config.paged_attention_num_blocks + SCRATCH_BLOCKS) * config.paged_attention_block_size
    models = [artifact] if artifact.draft is None else [artifact, artifact.draft]
    return artifact.parallel_config.data_parallel_size * sum(
        slots * model.parallel_config.tensor_parallel_size * _slot_bytes(cache)
        for model in models
        for cache in model.kv_cache
    )


def _slot_bytes(cache: KvCacheSpec) -> int:
    """Bytes of the keys and values of one token in one layer, per rank."""
    return sum(map(math.prod, cache.shapes.values())) * ITEMSIZE[cache.dtype]


def _sizes(buckets: Iterable[Sequence[int]]) -> str:
    return ", ".join("x".join(map(str, size)) for size in buckets)
