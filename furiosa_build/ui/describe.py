"""Plans and artifacts as text for a person."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.artifact.schema import DRAFT_DIRECTORY, Artifact, KvCacheSpec, ModelMetadata
from furiosa_build.core.text import duration_text, size_text
from furiosa_build.plan.budget.describe import available_text, kv_blocks_text, lowered_text, need_text, shortage_lines
from furiosa_build.plan.budget.placement import EMULATED, Element, element_name, placement
from furiosa_build.plan.budget.sizes import SCRATCH_BLOCKS
from furiosa_build.plan.explain import lines as change_lines
from furiosa_build.plan.planner import DRAFT

if TYPE_CHECKING:
    from furiosa_build.build.build import Build
    from furiosa_build.core.system import Machine
    from furiosa_build.plan.budget.costs import Need
    from furiosa_build.plan.budget.preflight import Preflight
    from furiosa_build.plan.explain import Explanation
    from furiosa_build.plan.planner import Plan


_MOST_CHANGES = 8
"""Of one step, in an explanation for people; `--json` has all."""


def plan_text(build: Build, machine: Machine | None = None) -> str:
    """The steps with their state, what each bucket compiles, and what the build needs. `machine`: not this one."""
    plan, spec = build.plan, build.spec
    lines = [
        f"recipe {spec.name}: {_model_text(plan)}",
        f"target {spec.target.name} ({plan.isa}), backend {spec.backend.name}, devices {spec.devices}",
        *_random_note(spec.model.seed_for_random_weight),
        *_checkpoint_note(build),
        *_draft_lines(build),
        *_placement_lines(placement(plan)),
        "steps",
    ]
    figures = build.preflight(machine=machine)
    width = max(len(name) for name in plan.steps)
    for name, step in plan.steps.items():
        lines.append(f"  {'to do' if name in figures.work else 'done '}  {name:{width}}  {step.description}")
    lines.append("buckets")
    for model, prefix in zip(plan.models, ("", DRAFT), strict=False):
        for bucket, found in model.kinds.items():
            kinds = ", ".join(f"{k.name} ({len(k.layers)} layers)" if k.layers else k.name for k in found)
            lines.append(f"  {prefix + bucket.name:{width}}  compiles {kinds}")
    lines += ["needs", *(f"  {line}" for line in _need_lines(build, figures))]
    if figures.shortages:
        lines += ["A BUILD WOULD BE REFUSED", *shortage_lines(figures)]
    lines.append(f"{len(plan.steps) - len(figures.work)} steps done, {len(figures.work)} to do")
    return "\n".join(lines)


def _model_text(plan: Plan) -> str:
    quantized = f"{plan.quantization}, {len(plan.schemes())} weights" if plan.schemes() else "no quantization"
    outline = plan.outline
    return f"{outline.architecture}, {_count(outline.num_parameters)} parameters, {outline.dtype}, {quantized}"


def _draft_lines(build: Build) -> Iterator[str]:
    draft, plan = build.draft, build.plan.draft
    if draft is None or plan is None:
        return
    proposed = build.spec.num_speculative_tokens
    yield f"draft {draft.spec.name}: {_model_text(plan)}; proposes {proposed} tokens at a time"
    for note in (*_random_note(draft.spec.model.seed_for_random_weight), *_checkpoint_note(draft)):
        yield f"  {note}"


def plan_data(build: Build, machine: Machine | None = None) -> dict[str, Any]:
    """What `plan_text` says, as plain data: bytes and seconds, null where they are unknown."""
    figures = build.preflight(machine=machine)
    return {
        "recipe": build.spec.name,
        "steps": [
            {
                "step": name,
                "description": step.description,
                "state": "to do" if name in figures.work else "done",
                **({} if name not in figures.work else asdict(figures.work[name])),
                **({} if name not in figures.work else {"seconds": build.estimate_seconds(name)}),
            }
            for name, step in build.plan.steps.items()
        ],
        "programs": figures.programs,
        "num_compile_workers": figures.compile_workers,
        "read": figures.read,
        "written": figures.written,
        "disks": [_need_data(need) for need in figures.disks],
        "memory": _need_data(figures.memory),
        "device": _need_data(figures.device),
        "kv_blocks": asdict(build.plan.kv_blocks),
        "seconds": None if figures.unknown_times else figures.seconds,
        "refused": [{**_need_data(short.need), "remedy": short.remedy} for short in figures.shortages],
    }


def explain_text(explanations: Iterable[Explanation]) -> str:
    """For each step whether it is up to date, and if not, why."""
    found = list(explanations)
    width = max(len(one.step) for one in found)
    lines = []
    for one in found:
        awaited = f"for {', '.join(one.waits_for[:2])}{', ...' if one.waits_for[2:] else ''}: "
        why = f"{awaited if one.state == 'waits' else ''}{one.reason}"
        lines.append(f"{one.state:10}  {one.step:{width}}  {why}".rstrip())
        changes = change_lines(one.changes)
        lines += [f"{'':14}{change}" for change in changes[:_MOST_CHANGES]]
        if len(changes) > _MOST_CHANGES:
            lines.append(f"{'':14}and {len(changes) - _MOST_CHANGES} more")
    done = sum(one.state == "up to date" for one in found)
    lines.append(f"{done} of {len(found)} steps are up to date")
    return "\n".join(lines)


def result_text(build: Build) -> str:
    """What has been built: path, size, and how it qualified."""
    directory = build.version_directory
    return "\n".join(
        [
            f"artifact   {short_path(directory)} ({size_text(artifact_size(directory))})",
            f"qualified  {_qualification(directory)}",
            *_random_note(build.spec.model.seed_for_random_weight),
            *(f"runs on    {line}" for line in list(_placement_lines(placement(build.plan)))[:1]),
        ]
    )


def _placement_lines(used: Sequence[Element]) -> Iterator[str]:
    """What lies where. Nothing of a model that is not divided."""
    if len(used) == 1 and not used[0].name.startswith("npu"):
        return
    yield f"{len(used)} elements, each {EMULATED}"
    for one in used:
        yield (
            f"  {one.name:22} replica {one.replica}, stage {one.stage}, rank {one.rank}: layers {one.layers[0]} to "
            f"{one.layers[1]}, parameters {size_text(one.parameters)}, KV cache {size_text(one.kv_cache)}"
        )


def _artifact_placement(artifact: Artifact, directory: Path) -> list[Element]:
    """As `placement` plans it, from the files that there are."""
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


def artifact_text(artifact: Artifact, directory: Path) -> str:
    """What an artifact is, for `furiosa-build inspect`."""
    meta, model, config = artifact.metadata, artifact.model_metadata, artifact.generator_config
    scheduler, beams = config.default_scheduler_config, config.kv_cache_sharing_across_beams_config
    sizes = {
        part: sum(f.stat().st_size for f in (directory / part).rglob("*") if f.is_file())
        for part in ("params", "programs", "model", DRAFT_DIRECTORY)
    }
    of_draft = f", draft model {size_text(sizes[DRAFT_DIRECTORY])}" if artifact.draft else ""
    parallel = artifact.parallel_config
    lines = [
        f"artifact      {meta.name} {meta.artifact_id[:12]}, schema {artifact.schema_version}",
        f"made by       furiosa_build {meta.version.furiosa_llm}, {meta.version.furiosa_compiler}, "
        f"{datetime.fromtimestamp(meta.timestamp, UTC):%Y-%m-%d %H:%M} UTC",
        f"model         {_of_model(model)}",
        *(f"              {line}" for line in _random_note(model.seed_for_random_weight)),
        f"quantization  {model.quantization}",
        *_draft_of_artifact(artifact),
        f"devices       {artifact.devices}: tensor_parallel_size={parallel.tensor_parallel_size}, "
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}, data_parallel_size={parallel.data_parallel_size}",
        *_placement_lines(_artifact_placement(artifact, directory)),
        f"target        {artifact.target.name}: instruction set {artifact.target.isa}, torch {artifact.target.torch}",
        f"buckets       prefill {_sizes(config.prefill_buckets)}; "
        f"{f'append {_sizes(config.append_buckets)}; ' if config.append_buckets else ''}"
        f"decode {_sizes(config.decode_buckets)}; "
        f"sequences up to {config.max_seq_len_to_capture} tokens",
        *([f"beam search   {beams.beam_width} beams of up to {beams.max_new_tokens} tokens"] if beams else []),
        f"KV cache      {config.paged_attention_num_blocks} blocks of {config.paged_attention_block_size} tokens, "
        f"{size_text(_kv_bytes(artifact))}",
        f"scheduler     max_processing_samples={scheduler.max_processing_samples}, "
        f"spare_blocks_ratio={scheduler.spare_blocks_ratio}, is_offline={scheduler.is_offline}, "
        f"prefill_chunk_size={scheduler.prefill_chunk_size}",
        f"size          {size_text(artifact_size(directory))}: parameters {size_text(sizes['params'])}, programs "
        f"{size_text(sizes['programs'])}, model files {size_text(sizes['model'])}{of_draft}",
        "programs",
        *_program_lines(artifact, directory),
        *(["programs of the draft", *_program_lines(artifact.draft, directory)] if artifact.draft else []),
        f"qualified     {_qualification(directory.resolve())}",
    ]
    return "\n".join(lines)


def _of_model(model: ModelMetadata) -> str:
    revision = f" at {model.revision}" if model.revision else ""
    return (
        f"{model.pretrained_id}{revision} ({model.architecture}, {model.num_hidden_layers} layers, "
        f"{_count(model.num_parameters)} parameters, {model.dtype})"
    )


def _draft_of_artifact(artifact: Artifact) -> Iterator[str]:
    if (draft := artifact.draft) is None:
        return
    proposed = artifact.generator_config.num_speculative_tokens
    yield f"draft         {draft.metadata.name} {draft.metadata.artifact_id[:12]}: proposes {proposed} tokens at a time"
    yield f"              {_of_model(draft.model_metadata)}, quantization {draft.model_metadata.quantization}"
    yield from (f"              {line}" for line in _random_note(draft.model_metadata.seed_for_random_weight))


def _program_lines(artifact: Artifact, directory: Path) -> Iterator[str]:
    uses = Counter((pipeline.name, task.program) for pipeline in artifact.pipelines for task in pipeline.supertasks)
    for name, program in artifact.programs.items():
        used_by = ", ".join(f"{n} x in {pipeline}" for (pipeline, p), n in uses.items() if p == name)
        size = (directory / program.file).stat().st_size
        yield f"  {name:28} {program.kind:8} {size_text(size):>10}  {used_by}"


def artifact_size(directory: Path) -> int:
    """Bytes of all files of an artifact."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _need_lines(build: Build, figures: Preflight) -> Iterator[str]:
    asked = build.options.num_compile_workers
    if figures.programs:
        at_a_time = min(figures.compile_workers, figures.programs)
        lowered = "" if figures.compile_workers == asked else f"; {lowered_text(figures, asked)}"
        yield f"programs  {figures.programs} to compile, {at_a_time} at a time{lowered}"
    if figures.work:
        yield f"bytes     {size_text(figures.read)} to read, {size_text(figures.written)} to write"
    for need in figures.disks:
        yield f"disk      {need_text(need)} of {available_text(need)} free in {need.what}"
    if figures.work:
        yield f"memory    {need_text(figures.memory)} of {available_text(figures.memory)} available"
    yield f"KV cache  {kv_blocks_text(build.plan)}"
    yield f"device    {need_text(figures.device)}{_device_note(figures)}"
    if figures.work:
        yield f"time      {_time_text(figures)}"


def _device_note(figures: Preflight) -> str:
    """Whether the artifact fits the device."""
    if figures.device.available is None:
        return "; the target does not say how much memory it has"
    whose = "an element of the target" if figures.device.what == "element" else "the target"
    whose = "this machine" if figures.device_is_host else whose
    of = f" of the {size_text(figures.device.available)} that {whose} has"
    if figures.device.fits:
        return f"{of}: fits"
    slow = ", parameters will be read from the disk again and again" if figures.device_is_host else ""
    return f"{of}: does not fit{slow}"


def _time_text(figures: Preflight) -> str:
    if figures.seconds == 0 and figures.unknown_times:
        return "not known: no step of these kinds has run before"
    unknown = f", besides {', '.join(figures.unknown_times)}: not known" if figures.unknown_times else ""
    return f"about {duration_text(figures.seconds)}, as such steps took before{unknown}"


def _need_data(need: Need) -> dict[str, Any]:
    return {"what": need.what, "needed": need.needed, "parts": dict(need.parts), "available": need.available}


def _qualification(directory: Path) -> str:
    path = directory.with_suffix(".qualify.json")
    if not path.is_file():
        return "not known"
    figures = json.loads(path.read_bytes())
    accepted = figures.get("draft_acceptance")
    of_draft = "" if accepted is None else f"; {accepted:.0%} of the draft's tokens accepted"
    return (
        f"{figures['tokens']} tokens, top-1 agreement {figures['top1_agreement']:.0%}, largest logit difference "
        f"{figures['largest_logit_difference']:.2g} (allowed {figures['allowed_logit_difference']:.2g}){of_draft}"
    )


def _random_note(seed: int | None) -> list[str]:
    return [] if seed is None else [f"THE WEIGHTS ARE RANDOM, drawn from seed {seed}"]


def _checkpoint_note(build: Build) -> list[str]:
    if build.checkpoint is None:
        return []
    path = build.spec.quantization.quantize_artifact_path
    return [f"quantized checkpoint {path}: {build.checkpoint.described}"]


def _kv_bytes(artifact: Artifact) -> int:
    """Of the model; and of a draft for each of its replicas."""
    config = artifact.generator_config
    slots = (config.paged_attention_num_blocks + SCRATCH_BLOCKS) * config.paged_attention_block_size
    models = [artifact] if artifact.draft is None else [artifact, artifact.draft]
    return artifact.parallel_config.data_parallel_size * sum(
        slots * model.parallel_config.tensor_parallel_size * _slot_bytes(cache)
        for model in models
        for cache in model.kv_cache
    )


def _slot_bytes(cache: KvCacheSpec) -> int:
    """Of the keys and values of one token, of one rank."""
    heads, size = cache.shape_per_slot
    return 2 * heads * size * {"float32": 4, "bfloat16": 2, "float16": 2}[cache.dtype]


def _sizes(buckets: Iterable[Sequence[int]]) -> str:
    return ", ".join("x".join(map(str, size)) for size in buckets)


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def short_path(path: Path) -> str:
    """Relative to the current directory if it is below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
