"""What is asked before steps run: whether their tools are there, and whether machine and target have what it takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from furiosa_build.build.executors.local import WorkerPool
from furiosa_build.core.errors import PreflightError, UserError
from furiosa_build.core.system import Machine

if TYPE_CHECKING:
    from furiosa_build.build.build import Build


def begin(build: Build, steps: Iterable[str], machine: Machine | None = None) -> list[str]:
    """Checks, before `steps` are run, that they can be. Returns notes for people.

    Without steps that are to do it asks nothing of the machine. `machine`: not this one.

    Raises UserError when a tool is missing, PreflightError when the steps that are to do cannot fit.
    """
    undone = [name for name in steps if not build.is_done(name)]
    check_toolchain(build, undone)
    if not undone:
        return []
    tokenizer = build.plan.model.tokenizer
    if tokenizer is not None and tokenizer.unknown:
        raise UserError(tokenizer.unknown)
    from furiosa_build.plan.budget.describe import kv_blocks_text, lowered_text, refusal_text, tokenizer_notes

    figures = build.preflight(undone, machine)
    if figures.shortages:
        raise PreflightError(refusal_text(figures))
    notes = tokenizer_notes(build.plan.model) if "package" in undone else []
    if build.plan.kv_blocks.source == "memory" and "package" in undone:
        notes.append(f"KV cache: {kv_blocks_text(build.plan)}")
    if figures.compile_workers != build.options.num_compile_workers:
        compilers = build.executors["compiler"]
        assert isinstance(compilers, WorkerPool)
        compilers.workers = figures.compile_workers
        notes.append(lowered_text(figures, build.options.num_compile_workers))
    return notes


def check_toolchain(build: Build, undone: Iterable[str]) -> None:
    """Raises UserError when there are programs to compile in the steps `undone` and a tool for that is missing."""
    compiling = [step for step in map(build.plan.steps.__getitem__, undone) if step.type.worker == "compiler"]
    for model_id in {step.model_id for step in compiling}:
        build.models[model_id].backend.check_toolchain()
