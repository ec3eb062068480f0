"""The figures of a build as text for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from furiosa_build.core.text import size_text
from furiosa_build.plan.kv_blocks import element_memory

if TYPE_CHECKING:
    from furiosa_build.plan.budget.costs import Requirement
    from furiosa_build.plan.budget.preflight import Preflight
    from furiosa_build.plan.model import ModelPlan
    from furiosa_build.plan.planner import Plan


_SHOWN_TOKENS = 8


def refusal_text(figures: Preflight) -> str:
    """Why a build is refused."""
    return "\n".join(["the build cannot fit", *shortage_lines(figures)])


def lowered_text(figures: Preflight, asked: int) -> str:
    """A note that fewer programs are compiled at a time than was asked for."""
    assert figures.memory.available is not None
    return (
        f"num_compile_workers: {asked} asked for, the memory is for {figures.compile_workers} "
        f"({size_text(figures.memory.available)} available, each takes {size_text(figures.compile_worker)})"
    )


def tokenizer_notes(model: ModelPlan) -> list[str]:
    """What a person should know of the artifact's tokenizer: that there is none, or that tokens cannot be used."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        why = (
            "as model.tokenizer says" if model.spec.model.tokenizer == "none" else f"{model.pretrained_id} brings none"
        )
        return [f"no tokenizer, {why}: the artifact takes and gives token ids"]
    if tokenizer.unknown:
        return [f"tokenizer: not known before its files are fetched: {tokenizer.unknown.splitlines()[0]}"]
    beyond = [f"{token} ({id_})" for token, id_ in tokenizer.beyond_vocabulary.items()]
    if not beyond:
        return []
    rest = len(beyond) - _SHOWN_TOKENS
    shown = ", ".join(beyond[:_SHOWN_TOKENS]) + (f" and {rest} more" if rest > 0 else "")
    return [
        f"tokenizer: the model's vocabulary of {model.outline.vocab_size} tokens lacks {shown}: "
        "requests with these are refused"
    ]


def kv_blocks_text(plan: Plan) -> str:
    """How many KV blocks a layer has, and what the number follows from."""
    blocks, room, spec = plan.kv_blocks, plan.kv_blocks.room, plan.model.spec
    shown = f"{blocks.count} blocks of {spec.buckets.paged_attention_block_size} tokens"
    filled = f"what the largest decode bucket fills{'' if blocks.source == 'bucket' else f': {blocks.needed}'}"
    if blocks.source == "given":
        return f"{shown}, as given ({filled})"
    if room is None or blocks.source == "bucket":
        return f"{shown}, derived: {filled}" + ("" if room is None else f"; the memory has room for {room.blocks}")
    whose = "an element" if element_memory(spec) is not None else "the device"
    one = "" if room.blocks >= blocks.count else ", too few for one sequence"
    return (
        f"{shown}, derived from the memory of target {spec.target.name}: ({size_text(room.memory)} of {whose} - "
        f"{size_text(room.parameters)} of parameters) / {size_text(room.block)} a block, less one for padding: "
        f"{room.blocks}{one} ({filled})"
    )


def requirement_text(requirement: Requirement) -> str:
    """A requirement by its parts, such as `2.5 GB (parameters 2.4 GB, programs 100 MB)`."""
    parts = ", ".join(f"{what} {size_text(size)}" for what, size in requirement.parts.items())
    return size_text(requirement.needed) + (f" ({parts})" if len(requirement.parts) > 1 else "")


def available_text(requirement: Requirement) -> str:
    """The bytes that there are for a requirement."""
    return "an unknown amount" if requirement.available is None else size_text(requirement.available)


def shortage_lines(figures: Preflight) -> Iterator[str]:
    """Two lines for each shortage: what is missing, and what to do about it."""
    for short in figures.shortages:
        missing = short.requirement
        yield f"  {missing.what}: {requirement_text(missing)} needed, {available_text(missing)} there"
        yield f"    hint: {short.remedy}"
