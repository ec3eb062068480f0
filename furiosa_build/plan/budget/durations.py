"""How long steps will take, from how long steps of their kind took before. Nothing is known the first time."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from statistics import median
from typing import Any, NamedTuple

from furiosa_build.ir.outline import ParameterOutline
from furiosa_build.plan.budget.sizes import nbytes
from furiosa_build.plan.planner import Plan, Step
from furiosa_build.quant.scheme import summary

_FURTHEST = 10
"""A step that reads weights is compared with one that read up to so many times as much, or as little. Further away,
what does not grow with the weights (importing torch) would spoil the comparison."""


class Past(NamedTuple):
    """A finished step: its name, the seconds it took, the factors of its key, the sha256 of the files it made."""

    step: str
    seconds: float
    factors: Mapping[str, Any]
    outputs: frozenset[str]


class _Kind(NamedTuple):
    """Steps that are `alike` take as long as each other; where they have a size, in proportion to it."""

    alike: tuple[str | bool, ...]
    size: int | None = None


class Durations:
    """Estimates from finished steps."""

    def __init__(self, history: Iterable[Past]) -> None:
        self._known: dict[tuple[str | bool, ...], list[tuple[int | None, float]]] = {}
        history = list(history)
        makers = {sha256: past.factors for past in history for sha256 in past.outputs}
        for past in history:
            with suppress(KeyError, TypeError, AttributeError, ValueError):  # recorded by another version
                kind = _kind_of_past(past, makers)
                if kind is not None:
                    self._known.setdefault(kind.alike, []).append((kind.size, past.seconds))

    def estimate(self, step: Step, plan: Plan) -> float | None:
        """Seconds; None when no such step has run, or none of a comparable size."""
        seeded = plan.spec.model.seed_for_random_weight is not None
        kind = _kind(step.name, step.action, step.reads, step.needs, seeded, plan.steps["package"].reads)
        known = [] if kind is None else self._known.get(kind.alike, [])
        if not known:
            return None
        assert kind is not None
        if kind.size is None:
            return median(seconds for _, seconds in known)
        ratios = [(kind.size / size, seconds) for size, seconds in known if size]
        ratio, seconds = min(ratios, key=lambda found: abs(math.log(found[0])), default=(math.inf, 0.0))
        return seconds * ratio if 1 / _FURTHEST <= ratio <= _FURTHEST else None


def total_seconds(estimates: Iterable[tuple[Step, float]], builders: int, compilers: int) -> float:
    """How long the steps take together when so many trace and so many compile at a time."""
    of: dict[str, list[float]] = {}
    for step, seconds in estimates:
        of.setdefault(step.action, []).append(seconds)
    alone = {action: sum(seconds) for action, seconds in of.items()}
    weights = alone.get("quantize", 0.0) + alone.get("shard", 0.0)
    building = max(weights, (weights + alone.get("trace", 0.0)) / builders)
    compiling = max(alone.get("compile", 0.0) / compilers, max(of.get("compile", ()), default=0.0))
    return sum(alone.get(action, 0.0) for action in ("fetch", "package", "qualify")) + max(building, compiling)


def _kind_of_past(past: Past, makers: Mapping[str, Mapping[str, Any]]) -> _Kind | None:
    inputs = past.factors["inputs"]

    def read_by(needed: str) -> Mapping[str, Any]:
        """What the step that made these inputs has read."""
        made = (makers[sha256] for sha256 in inputs.get(needed, {}).values() if sha256 in makers)
        return next(made, {}).get("reads", {})  # type: ignore[no-any-return]

    seeded = "seed" in read_by("fetch") or "seed" in past.factors["reads"]
    return _kind(past.step, past.factors["step"], past.factors["reads"], inputs, seeded, read_by("package"))


def _kind(
    name: str,
    action: str,
    reads: Mapping[str, Any],
    needs: Collection[str],
    seeded: bool,
    package: Mapping[str, Any],
) -> _Kind | None:
    """None for a step that is like no other. `seeded`: weights are drawn; `package`: what that step reads."""
    scheme = summary(reads.get("schemes", {}).values())
    role = name.rpartition(":")[2].rstrip("0123456789")
    match action:
        case "fetch":  # files that are hashed, or come through a network: nobody knows how fast
            return _Kind((action,)) if seeded else None
        case "quantize":
            writes = scheme != "none" and "taken" not in reads  # else it looks at the weights' shapes
            alike = (action, scheme if writes else "none", writes and seeded)
            return _Kind(alike, _size(reads["parameters"]) if writes else None)
        case "shard":
            writes = "fetch" in needs  # else it links what quantize has written
            return _Kind((action, writes, writes and seeded), _size(reads["parameters"]) if writes else None)
        case "trace":
            return _Kind((action, role, bool(reads["schemes"])))
        case "compile":
            return _Kind((action, reads["backend"], role))
        case "qualify":
            drawn = seeded and scheme == "none"
            return _Kind((action, package["backend"]["name"], scheme, drawn), _size(package["outline"]["parameters"]))
    return _Kind((action,))


def _size(parameters: Mapping[str, Any]) -> int:
    """Bytes of the parameters before they are quantized."""
    return sum(nbytes(ParameterOutline.model_validate(parameter)) for parameter in parameters.values())
