"""Figures of plans, with disks and machines made by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from furiosa_build.core.system import Disk, Machine
from furiosa_build.plan.budget.costs import Disks, SourceState
from furiosa_build.plan.budget.durations import Durations
from furiosa_build.plan.budget.preflight import Preflight, preflight
from furiosa_build.plan.planner import Plan
from furiosa_build.recipe.schema import BuildOptions
from furiosa_build.steps.registry import STEPS

from .outlines import plan

GB = 10**9
FP8, INT8 = {"scheme": "fp8"}, {"scheme": "int8"}
INDUCTOR = {"name": "inductor"}
FROM_HUB = {"seed_for_random_weight": None}
BIG = Machine(cores=8, memory=64 * GB, available=60 * GB)
STORE, OUTPUT, HUB = (Path("/") / name for name in ("store", "artifacts", "hub"))

# Memory of a worker, of one that compiles with inductor, of the process that judges the artifact, and of the one that
# runs it: see plan/budget/costs.py.
WORKER, COMPILE_WORKER, JUDGE, PROBE = 300_000_000, 760_000_000, 300_000_000, 170_000_000

COMPILING = tuple(name for name in plan().steps if name.startswith(("compile", "partition:decode")))


def places(store: int | None = 60 * GB, output: int | None = None, hub: int | None = None, cached: int = 0) -> Disks:
    """Disks with so many free bytes; where `output` is not given the artifact is on the store's."""
    return Disks(
        Disk(STORE, 1, store),
        Disk(OUTPUT, 1, store) if output is None else Disk(OUTPUT, 2, output),
        {"": SourceState(None if hub is None else Disk(HUB, 3, hub), cached)},
    )


def figures(
    of: Plan,
    at: Disks | None = None,
    machine: Machine = BIG,
    steps: Iterable[str] | None = None,
    perhaps: Iterable[str] = (),
    **options: int,
) -> Preflight:
    """`steps` are to do (None: all). Those of `perhaps` may turn out to be up to date."""
    undone = {name: name not in set(perhaps) for name in (of.steps if steps is None else steps)}
    return preflight(of, BuildOptions(**options), undone, at or places(), machine, Durations([], STEPS))


def refused(found: Preflight) -> dict[str, tuple[int, int | None]]:
    """What is short: bytes needed and there."""
    return {
        short.requirement.what: (short.requirement.needed, short.requirement.available) for short in found.shortages
    }


def remedies(found: Preflight) -> str:
    return "\n".join(short.remedy for short in found.shortages)
