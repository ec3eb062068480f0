"""How long steps will take, from how long steps of their kind took before. Nothing is known the first time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from furiosa_build.plan.planner import Plan, PlannedStep

if TYPE_CHECKING:
    from furiosa_build.steps.base import Likeness, Step

_FURTHEST = 10
"""A step that reads weights is compared with one that read up to so many times as much, or as little. Further away,
what does not grow with the weights (importing torch) would spoil the comparison."""


class FinishedStep(NamedTuple):
    """A finished step: its name, the seconds it took, the factors of its key, the sha256 of the files it made."""

    step: str
    seconds: float
    factors: Mapping[str, Any]
    outputs: frozenset[str]


class KnownStep(NamedTuple):
    """What is known of a step that is planned, and of one that was done.

    Attributes:
        name: Its name among the steps of its model.
        reads: What it reads of the BuildSpec and the outline.
        needs: What the steps that it needs read, by their names.
    """

    name: str
    reads: Mapping[str, Any]
    needs: Mapping[str, Mapping[str, Any]]

    @property
    def role(self) -> str:
        """The kind of supertask that it is for, without a number: `block` of `compile:decode-1x512:block1`."""
        return self.name.rpartition(":")[2].rstrip("0123456789")

    @property
    def is_drawn(self) -> bool:
        """Whether it is known to use weights that are drawn from a seed."""
        return "seed" in self.needs.get("fetch", {}) or "seed" in self.reads


class Durations:
    """Estimates from finished steps, of these kinds."""

    def __init__(self, history: Iterable[FinishedStep], kinds: Iterable[Step[Any]]) -> None:
        self._known: dict[tuple[str | bool, ...], list[tuple[int | None, float]]] = {}
        history, of_name = list(history), {kind.name: kind for kind in kinds}
        makers = {sha256: finished.factors for finished in history for sha256 in finished.outputs}
        for finished in history:
            with suppress(KeyError, TypeError, AttributeError, ValueError):  # recorded by another version
                likeness = of_name[finished.factors["step"]].likeness(_known_step(finished, makers))
                if likeness is not None:
                    self._known.setdefault(_class(finished.factors["step"], likeness), []).append(
                        (likeness.size, finished.seconds)
                    )

    def estimate(self, step: PlannedStep, plan: Plan) -> float | None:
        """Seconds; None when no such step has run, or none of a comparable size."""
        needed = {plan.steps[name].name_for(step): plan.steps[name].reads for name in step.needs}
        likeness = step.type.likeness(KnownStep(step.own_name, step.reads, needed))
        known = [] if likeness is None else self._known.get(_class(step.action, likeness), [])
        if likeness is None or not known:
            return None
        if likeness.size is None:
            return median(seconds for _, seconds in known)
        ratios = [(likeness.size / size, seconds) for size, seconds in known if size]
        ratio, seconds = min(ratios, key=lambda found: abs(math.log(found[0])), default=(math.inf, 0.0))
        return seconds * ratio if 1 / _FURTHEST <= ratio <= _FURTHEST else None


def total_seconds(estimates: Iterable[tuple[PlannedStep, float]], builders: int, compilers: int) -> float:
    """How long the steps take together when so many build and so many compile at a time."""
    taken = {step.name: (step, seconds) for step, seconds in estimates}
    by_worker: dict[str, list[float]] = {"builder": [], "compiler": [], "here": []}
    ends: dict[str, float] = {}
    for name, (step, seconds) in taken.items():
        by_worker["here" if step.type.alone else step.type.worker].append(seconds)
        if step.type.worker == "builder" and not step.type.alone:
            ends[name] = seconds + max((ends.get(needed, 0.0) for needed in step.needs), default=0.0)
    building = max(max(ends.values(), default=0.0), sum(by_worker["builder"]) / builders)
    compiling = max(sum(by_worker["compiler"]) / compilers, max(by_worker["compiler"], default=0.0))
    return sum(by_worker["here"]) + max(building, compiling)


def _class(action: str, likeness: Likeness) -> tuple[str | bool, ...]:
    return (action, *likeness.alike)


def _known_step(finished: FinishedStep, makers: Mapping[str, Mapping[str, Any]]) -> KnownStep:
    needed: dict[str, Mapping[str, Any]] = {}
    for step, files in finished.factors["inputs"].items():
        made = (makers[sha256]["reads"] for sha256 in files.values() if sha256 in makers)
        needed[step] = next(made, {})
    return KnownStep(finished.step, finished.factors["reads"], needed)
