"""Estimates of time, from histories made by hand: the steps of plans that were built before."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_build.plan.budget.durations import Durations, FinishedStep, total_seconds
from furiosa_build.plan.keys import key_factors
from furiosa_build.plan.planner import Plan, PlannedStep
from furiosa_build.recipe.schema import BuildSpec
from furiosa_build.steps.registry import STEPS

from .outlines import outline, plan, spec


def build(of: BuildSpec, layers: int = 3) -> Plan:
    return plan(of, outline(layers=layers))


def history(built: Plan, seconds: Mapping[str, float], run: str = "0") -> list[FinishedStep]:
    """What remains of a build whose steps took `seconds`, by the beginning of their names. `run`: another time."""
    files = {"fetch": "weights.json", "quantize": "model.safetensors", "package": "artifact.json"}
    made = {name: {files.get(name, "output"): f"{run} {name}"} for name in built.steps}
    return [
        FinishedStep(
            name,
            next(took for beginning, took in seconds.items() if name.startswith(beginning)),
            key_factors(step.action, step.reads, {needed: made[needed] for needed in step.needs}, {}, {}),
            frozenset(made[name].values()),
        )
        for name, step in built.steps.items()
        if any(name.startswith(beginning) for beginning in seconds)
    ]


SECONDS = {
    "fetch": 1.0,
    "quantize": 8.0,
    "partition:weights": 4.0,
    "partition:": 2.0,
    "compile:": 16.0,
    "package": 0.5,
    "qualify": 32.0,
}
FROM_HUB = {"seed_for_random_weight": None}
FP8 = {"scheme": "fp8"}


def estimates(before: Plan, now: Plan) -> dict[str, float | None]:
    durations = Durations(history(before, SECONDS), STEPS)
    return {name: durations.estimate(step, now) for name, step in now.steps.items()}


def test_nothing_is_known_the_first_time() -> None:
    built = plan()
    assert {Durations([], STEPS).estimate(step, built) for step in built.steps.values()} == {None}


def test_the_same_again_takes_as_long() -> None:
    found = estimates(plan(), plan())
    expected = {name: past.seconds for name, past in zip(found, history(plan(), SECONDS), strict=True)}
    assert found == expected


def test_another_bucket_takes_as_long_as_those_before() -> None:
    more = plan(spec(buckets={"decode_buckets": [[2, 64], [4, 64]]}))
    assert estimates(plan(), more)["compile:decode-4x64:block"] == 16.0


@pytest.mark.parametrize(
    ("quantization", "streaming"), [({}, "partition:weights"), (FP8, "quantize")], ids=["none", "fp8"]
)
def test_steps_that_stream_weights_grow_with_them(quantization: dict[str, str], streaming: str) -> None:
    small, large = (build(spec(quantization=quantization), layers) for layers in (3, 20))
    ratio = (6432 + 20 * 800) / (6432 + 3 * 800)
    found = estimates(small, large)
    assert found[streaming] == pytest.approx(SECONDS[streaming] * ratio)
    assert found["qualify"] == pytest.approx(SECONDS["qualify"] * ratio)
    assert found["compile:decode-2x64:block"] == 16.0


def test_the_nearest_size_counts() -> None:
    past = [
        *history(build(spec(), 3), {"fetch": 1.0, "partition:weights": 1000.0}, "first"),
        *history(build(spec(), 19), {"fetch": 1.0, "partition:weights": 10.0}, "second"),
    ]
    now = build(spec(), 20)
    assert Durations(past, STEPS).estimate(now.steps["partition:weights"], now) == pytest.approx(10.0, rel=0.1)


@pytest.mark.parametrize(("layers", "later"), [(1, 200), (200, 1)])
def test_a_size_that_is_far_from_all_is_not_known(layers: int, later: int) -> None:
    found = estimates(build(spec(), layers), build(spec(), later))
    assert (found["partition:weights"], found["qualify"]) == (None, None)
    assert found["compile:decode-2x64:last"] == 16.0


OTHERS: dict[str, tuple[BuildSpec, set[str]]] = {
    "backend": (spec(backend={"name": "inductor"}), {"compile", "qualify"}),
    "quantization": (spec(quantization=FP8), {"quantize", "partition", "partition:weights", "qualify"}),
    "weights from the hub": (spec(model=FROM_HUB), {"fetch", "partition:weights", "qualify"}),
}


@pytest.mark.parametrize(("other", "unlike"), OTHERS.values(), ids=OTHERS)
def test_what_makes_steps_of_another_kind(other: BuildSpec, unlike: set[str]) -> None:
    found = estimates(plan(), build(other))
    unknown = {name for name, seconds in found.items() if seconds is None}
    assert {name if name == "partition:weights" else name.partition(":")[0] for name in unknown} == unlike


def test_how_fast_weights_come_is_never_known_unless_they_are_drawn() -> None:
    from_hub = plan(spec(model=FROM_HUB))
    assert estimates(from_hub, from_hub)["fetch"] is None


def test_the_typical_time_counts_not_the_first_with_its_imports() -> None:
    built = plan()
    past = [entry for entry in history(built, {"compile:": 10.0}) if entry.step.endswith(":block")]
    past = [past[0]._replace(seconds=100.0), past[0], past[1]]
    assert Durations(past, STEPS).estimate(built.steps["compile:decode-2x64:block"], built) == 10.0


@pytest.mark.parametrize(
    "factors",
    [
        {},
        {"step": "compile", "reads": {}, "inputs": {}},
        {"step": "shard", "reads": {"parameters": {"a": {"dtype": "int3"}}}, "inputs": {"fetch": "digest"}},
        {"step": "qualify", "reads": {}, "inputs": {"package": {"artifact.json": "gone"}}},
        {"step": "package", "reads": None, "inputs": None},
    ],
)
def test_what_another_version_recorded_is_passed_over(factors: dict[str, object]) -> None:
    built = plan()
    past = [FinishedStep("partition:weights", 1.0, factors, frozenset({"x"})), *history(built, SECONDS)]
    assert Durations(past, STEPS).estimate(built.steps["partition:weights"], built) == 4.0


def of(**seconds: float) -> list[tuple[PlannedStep, float]]:
    """Steps that take so long: a step of a plan for each kind, `compile_0` and `compile_1` are two of one."""
    kinds = [name.partition("_")[0] for name in seconds]
    found = []
    for number, (kind, taken) in enumerate(zip(kinds, seconds.values(), strict=True)):
        steps = [step for step in plan(spec(quantization=FP8)).steps.values() if step.action == kind]
        found.append((steps[kinds[:number].count(kind)], taken))
    return found


def test_weights_and_programs_are_made_side_by_side() -> None:
    assert total_seconds(of(fetch=1, quantize=8, shard=4, trace=2, compile=10, package=1, qualify=3), 1, 1) == 19
    assert total_seconds(of(fetch=1, quantize=8, shard=4, trace=2, compile=50, package=1, qualify=3), 1, 1) == 55


def test_workers_share_programs_but_not_one() -> None:
    programs = of(compile_0=10, compile_1=11, compile_2=12, compile_3=13)
    assert total_seconds(programs, 1, 2) == 23
    assert total_seconds(programs, 1, 8) == 13


def test_weights_are_worked_on_one_at_a_time() -> None:
    """What is laid out is what has been quantized."""
    assert total_seconds(of(quantize=8, shard=4, trace=4), 4, 1) == 12


SOME = list(plan().steps.values())
steps_and_seconds = st.dictionaries(st.integers(0, len(SOME) - 1), st.floats(0, 1e6)).map(
    lambda found: [(SOME[number], found[number]) for number in sorted(found)]
)


@given(steps_and_seconds, st.integers(1, 16), st.integers(1, 16))
def test_more_workers_never_take_longer(steps: list[tuple[PlannedStep, float]], builders: int, compilers: int) -> None:
    together = total_seconds(steps, builders, compilers)
    assert total_seconds(steps, builders + 1, compilers + 1) <= together * (1 + 1e-9)
    longest, summed = max((seconds for _, seconds in steps), default=0.0), sum(seconds for _, seconds in steps)
    assert longest * (1 - 1e-9) / builders <= together <= summed * (1 + 1e-9)
