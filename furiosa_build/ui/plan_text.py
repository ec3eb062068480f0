"""What a build would do and what it needs: as text for a person, and as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from furiosa_build.core.text import count_text, duration_text, size_text
from furiosa_build.plan.budget.describe import (
    available_text,
    kv_blocks_text,
    lowered_text,
    requirement_text,
    shortage_lines,
    tokenizer_notes,
)
from furiosa_build.plan.budget.placement import placement
from furiosa_build.plan.model import DRAFT, step_name
from furiosa_build.ui.lines import placement_lines, random_note

if TYPE_CHECKING:
    from furiosa_build.build.build import Build
    from furiosa_build.build.models import OpenModel
    from furiosa_build.core.system import Machine
    from furiosa_build.plan.budget.costs import Requirement
    from furiosa_build.plan.budget.preflight import Preflight
    from furiosa_build.plan.model import ModelPlan


def plan_text(build: Build, machine: Machine | None = None) -> str:
    """The steps with their state, what each bucket compiles, and what the build needs. `machine`: not this one."""
    plan, spec = build.plan, build.spec
    lines = [
        f"recipe {spec.name}: {_model_text(plan.model)}",
        f"target {spec.target.name} ({plan.model.isa}), backend {spec.backend.name}, devices {spec.devices}",
        *_length_note(build),
        *random_note(spec.model.seed_for_random_weight),
        *_checkpoint_note(build.models[""]),
        *_draft_lines(build),
        *tokenizer_notes(plan.model),
        *placement_lines(placement(plan)),
        "steps",
    ]
    figures = build.preflight(machine=machine)
    width = max(len(name) for name in plan.steps)
    for name, step in plan.steps.items():
        lines.append(f"  {'to do' if name in figures.work else 'done '}  {name:{width}}  {step.description}")
    lines.append("buckets")
    for model_id, model in plan.models.items():
        for bucket, found in model.kinds.items():
            kinds = ", ".join(f"{k.name} ({len(k.layers)} layers)" if k.layers else k.name for k in found)
            lines.append(f"  {step_name(model_id, bucket.name):{width}}  compiles {kinds}")
    lines += ["needs", *(f"  {line}" for line in _need_lines(build, figures))]
    if figures.shortages:
        lines += ["A BUILD WOULD BE REFUSED", *shortage_lines(figures)]
    lines.append(f"{len(plan.steps) - len(figures.work)} steps done, {len(figures.work)} to do")
    return "\n".join(lines)


def _length_note(build: Build) -> list[str]:
    """The longest sequence, where the recipe leaves it to the model."""
    length, default = build.spec.buckets.max_seq_len_to_capture, build.recipe.spec.buckets.max_seq_len_to_capture
    told = (
        f"sequences up to {length} tokens, as the model's max_position_embeddings: no max_seq_len_to_capture is given"
    )
    return [] if length == default else [told]


def _model_text(model: ModelPlan) -> str:
    quantized = f"{model.quantization}, {len(model.schemes)} weights" if model.schemes else "no quantization"
    outline = model.outline
    return f"{outline.architecture}, {count_text(outline.num_parameters)} parameters, {outline.dtype}, {quantized}"


def _draft_lines(build: Build) -> Iterator[str]:
    draft, plan = build.models.get(DRAFT), build.plan.draft
    if draft is None or plan is None:
        return
    proposed = build.spec.num_speculative_tokens
    yield f"draft {draft.spec.name}: {_model_text(plan)}; proposes {proposed} tokens at a time"
    for note in (*random_note(draft.spec.model.seed_for_random_weight), *_checkpoint_note(draft)):
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
        "disks": [_requirement_data(need) for need in figures.disks],
        "memory": _requirement_data(figures.memory),
        "device": _requirement_data(figures.device),
        "kv_blocks": asdict(build.plan.kv_blocks),
        "seconds": None if figures.unknown_times else figures.seconds,
        "refused": [{**_requirement_data(short.requirement), "remedy": short.remedy} for short in figures.shortages],
    }


def _need_lines(build: Build, figures: Preflight) -> Iterator[str]:
    asked = build.options.num_compile_workers
    if figures.programs:
        at_a_time = min(figures.compile_workers, figures.programs)
        lowered = "" if figures.compile_workers == asked else f"; {lowered_text(figures, asked)}"
        yield f"programs  {figures.programs} to compile, {at_a_time} at a time{lowered}"
    if figures.work:
        yield f"bytes     {size_text(figures.read)} to read, {size_text(figures.written)} to write"
    for need in figures.disks:
        yield f"disk      {requirement_text(need)} of {available_text(need)} free in {need.what}"
    if figures.work:
        yield f"memory    {requirement_text(figures.memory)} of {available_text(figures.memory)} available"
    yield f"KV cache  {kv_blocks_text(build.plan)}"
    yield f"device    {requirement_text(figures.device)}{_device_note(figures)}"
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


def _requirement_data(need: Requirement) -> dict[str, Any]:
    return {"what": need.what, "needed": need.needed, "parts": dict(need.parts), "available": need.available}


def _checkpoint_note(model: OpenModel) -> list[str]:
    if model.checkpoint is None:
        return []
    path = model.spec.quantization.quantize_artifact_path
    return [f"quantized checkpoint {path}: {model.checkpoint.described}"]
