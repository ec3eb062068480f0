"""The plan of an artifact with a draft model: the steps of both, and what both together take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_build.core.system import Disk, Machine
from furiosa_build.plan.budget.costs import Costs, Disks, Requirement, SourceState
from furiosa_build.plan.budget.durations import Durations
from furiosa_build.plan.budget.placement import placement
from furiosa_build.plan.budget.preflight import Preflight, preflight
from furiosa_build.plan.budget.sizes import kv_slot_bytes
from furiosa_build.plan.model import DRAFT, ModelPlan
from furiosa_build.plan.planner import Plan, PlannedStep, make_plan
from furiosa_build.recipe.draft import draft_spec
from furiosa_build.recipe.schema import BuildOptions, BuildSpec
from furiosa_build.steps.registry import STEPS

from .outlines import model_plan, outline, plan, spec

GB = 10**9
MODEL, SMALL = outline(4), outline(1)
SPECULATIVE: dict[str, Any] = {"speculative": {"recipe": "small"}, "buckets": {"append_buckets": None}}
STORE, HUB, OUTPUT = (Disk(Path(path), number, None) for number, path in enumerate(("/store", "/hub", "/artifacts")))


def small(of: BuildSpec, **sections: Any) -> ModelPlan:
    """The draft for `of`; `sections` are those of its recipe."""
    return model_plan(draft_spec(spec(**{"name": "small", **sections}), of, "here"), SMALL)


def alone(of: BuildSpec, **sections: Any) -> Plan:
    """The plan of the draft for `of`, as it is by itself."""
    return make_plan({"": small(of, **sections)}, STEPS)


def both(of: BuildSpec | None = None, **sections: Any) -> Plan:
    """A plan with a draft; `sections` are those of the draft's recipe."""
    of = of or spec(**SPECULATIVE)
    return make_plan({"": model_plan(of, MODEL), "draft": small(of, **sections)}, STEPS)


def factors(step: PlannedStep) -> tuple[Any, ...]:
    """What the step's key is made of, but for what others have made."""
    needs = {step.site.before[name].name_for(step): files for name, files in step.needs.items()}
    return step.action, step.reads, needs


# The steps


def test_the_steps_of_the_draft_are_those_that_it_has_alone() -> None:
    of = spec(**SPECULATIVE)
    steps, by_itself = both(of).steps, alone(of).steps
    found = {step.own_name: factors(step) for step in steps.values() if step.model_id == DRAFT}
    assert found == {name: factors(step) for name, step in by_itself.items() if name not in ("package", "qualify")}
    assert {"fetch", "quantize", "partition:weights", "compile:decode-2x64:block"} <= set(found)


def test_the_other_steps_are_those_without_it_but_for_those_that_verify() -> None:
    with_draft, without = both().steps, plan(spec(buckets={"append_buckets": None}), MODEL, "any").steps
    own = {name: step for name, step in with_draft.items() if step.model_id == ""}
    more = set(own) - set(without)
    assert {name.split(":")[1] for name in more} == {"append-2x5x64"}
    assert {name for name in without if factors(own[name]) != factors(without[name])} == {"package"}


def test_they_can_run_in_this_order() -> None:
    seen: set[str] = set()
    for name, step in both().steps.items():
        assert name == step.name
        assert seen.issuperset(step.needs)
        seen.add(name)
    assert list(both().steps)[-2:] == ["package", "qualify"]


def test_the_artifact_is_made_of_both() -> None:
    needs = set(both().steps["package"].needs)
    assert {"fetch", "partition:weights", "draft:fetch", "draft:partition:weights"} <= needs
    assert "draft:compile:decode-2x64:last" in needs
    assert not {"quantize", "draft:quantize"} & needs


def test_without_a_draft_nothing_is_read_of_it() -> None:
    """So a key is what it was before there were drafts."""
    reads = plan().steps["package"].reads
    assert not {"draft", "speculative"} & set(reads)
    reads = both().steps["package"].reads
    assert reads["speculative"] == {"recipe": "small", "num_speculative_tokens": 4}
    assert reads["draft"]["name"] == "small"


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"name": "other"}, []),
        ({"quantization": {"scheme": "int8"}}, ["quantize", "partition:weights", "partition:*:block"]),
        ({"model": {"seed_for_random_weight": 1}}, ["fetch"]),
    ],
    ids=str,
)
def test_a_change_of_its_recipe_concerns_its_steps_and_the_artifact(
    sections: Mapping[str, Any], expected: list[str]
) -> None:
    before, after = both().steps, both(**sections).steps
    assert before.keys() == after.keys()
    differing = {name for name in before if factors(before[name]) != factors(after[name])}
    patterns = [f"draft:{name}" for name in expected]
    wanted = {name for name in before if any(Path(name).match(pattern) for pattern in patterns)}
    assert differing == {*wanted, "package"}


def test_a_step_knows_the_model_that_it_is_for() -> None:
    found = both()
    assert list(found.models) == ["", DRAFT]
    own, other = found.steps["fetch"], found.steps["draft:compile:decode-2x64:block"]
    assert (own.model_id, own.own_name, own.model) == ("", "fetch", found.model)
    assert (other.model_id, other.own_name, other.model) == (DRAFT, "compile:decode-2x64:block", found.draft)
    assert other.kind is not None
    assert len(other.kind.layers) == 1


# KV blocks and memory


def recipe(target: dict[str, Any] | None = None, **sections: Any) -> BuildSpec:
    """One decode bucket, 4 x 64, in blocks of 16 tokens: 16 blocks fill it, 4 are one sequence."""
    buckets = {"append_buckets": None, "decode_buckets": [[4, 64]], "paged_attention_block_size": 16}
    sections["buckets"] = {**buckets, "paged_attention_num_blocks": None, **sections.get("buckets", {})}
    return spec(target={"name": "npu", **(target or {})}, speculative={"recipe": "small"}, **sections)


def parameters(of: Plan) -> int:
    return sum(element.parameters for element in placement(of))


def test_the_draft_has_as_many_kv_blocks_as_the_model() -> None:
    """A sequence takes as many of each."""
    for blocks in (None, 9):
        found = both(recipe(buckets={"paged_attention_num_blocks": blocks}))
        assert found.kv_blocks.count == (blocks or 16)
        reads = found.steps["package"].reads
        assert reads["draft"]["kv_blocks"] == reads["kv_blocks"] == found.kv_blocks.count


@pytest.mark.parametrize("devices", ["cpu", "npu:0:0"])
def test_blocks_have_room_beside_the_parameters_of_both(devices: str) -> None:
    of_parameters = parameters(plan(model=MODEL)) + parameters(plan(model=SMALL))
    block = 16 * (kv_slot_bytes(MODEL, range(4), 1) + kv_slot_bytes(SMALL, range(1), 1))
    memory = of_parameters + (5 + 1) * block
    elements = 2 if devices.startswith("npu") else 1
    found = both(recipe({"memory_gb": elements * memory / GB, "num_elements": elements}, devices=devices))
    assert (found.kv_blocks.count, found.kv_blocks.source) == (5, "memory")
    assert found.kv_blocks.room is not None
    assert (found.kv_blocks.room.parameters, found.kv_blocks.room.block) == (of_parameters, block)
    [element] = placement(found)
    assert element.parameters + element.kv_cache == memory


def test_the_draft_lies_on_the_first_elements_of_each_replica() -> None:
    """Of two stages: the first has the draft as well."""
    sections: dict[str, Any] = {"devices": "npu:0:*", "parallel": {"pipeline_parallel_size": 2}}
    of = recipe({"num_elements": 4, "memory_gb": 1}, **sections)
    without = placement(
        plan(of.model_copy(update={"speculative": BuildSpec.model_fields["speculative"].default}), MODEL)
    )
    found, draft = placement(both(of)), placement(alone(of))
    assert [one.parameters for one in found] == [
        one.parameters + (draft[0].parameters if one.stage == 0 else 0) for one in without
    ]
    assert [one.kv_cache for one in found] == [
        one.kv_cache + (draft[0].kv_cache if one.stage == 0 else 0) for one in without
    ]
    assert [(one.replica, one.stage) for one in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]


@given(st.integers(1, 60_000), st.sampled_from(["cpu", "npu:0:*"]), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
def test_what_is_derived_from_the_memory_fits_it(memory: int, devices: str, replicas: int, stages: int) -> None:
    """Or is one sequence, and refused."""
    parallel = {"pipeline_parallel_size": stages, "data_parallel_size": replicas}
    found = both(recipe({"num_elements": 8, "memory_gb": 8 * memory / GB}, devices=devices, parallel=parallel))
    room = found.kv_blocks.room
    assert room is not None
    shortages = figures(found).shortages
    assert bool(shortages) == (room.blocks < 4)
    if not shortages:
        held = [element.parameters + element.kv_cache for element in placement(found)]
        assert max(held) <= memory if devices != "cpu" else sum(held) <= 8 * memory


# What the build needs


def figures(of: Plan, workers: int = 2) -> Preflight:
    places = Disks(STORE, OUTPUT)
    options = BuildOptions(num_compile_workers=workers)
    return preflight(
        of, options, dict.fromkeys(of.steps, True), places, Machine(2, 64 * GB, 60 * GB), Durations([], STEPS)
    )


def test_the_figures_are_the_sum_of_both() -> None:
    of = spec(**SPECULATIVE)
    together, model, draft = figures(both(of)), figures(plan(of, MODEL)), figures(alone(of))
    common = ("package", "qualify")
    for name, work in draft.work.items():
        assert name in common or together.work[f"draft:{name}"] == work
    for name, work in model.work.items():
        assert name in common or together.work[name] == work
    for name in common:
        files = draft.work["package"].written
        assert together.work[name].read == model.work[name].read + files
    assert together.programs == model.programs + draft.programs
    parts = [sum_of_parts(one.disks) for one in (together, model, draft)]
    for what in ("parameters", "programs", "a copy for the artifact"):
        assert parts[0][what] == parts[1][what] + parts[2][what] > 0
    of_devices = [one.device.parts["parameters"] for one in (together, model, draft)]
    assert of_devices[0] == of_devices[1] + of_devices[2]


def test_weights_of_both_may_be_written_at_a_time() -> None:
    """Of each the largest: the head, of the same vocabulary."""
    steps = {name: step for name, step in both().steps.items() if step.action == "shard"}
    costs = Costs(both(), Disks(STORE, OUTPUT))
    head = 100 * 8 * 4
    assert costs.memory(steps.values(), 2, 1, None).parts["weights"] == 2 * head
    for name in steps:
        assert costs.memory([steps[name]], 2, 1, None).parts["weights"] == head


def sum_of_parts(disks: tuple[Requirement, ...]) -> dict[str, int]:
    return {what: size for need in disks for what, size in need.parts.items()}


@pytest.mark.parametrize("in_draft", [False, True])
def test_the_largest_compile_worker_counts(in_draft: bool) -> None:
    """That of the model whose parameters are in the programs."""
    of = spec(**SPECULATIVE, rewriting={"embed_all_constants_into_graph": not in_draft})
    places, own = Disks(STORE, OUTPUT), {"rewriting": {"embed_all_constants_into_graph": in_draft}}
    workers = [Costs(each, places).compile_worker for each in (plan(of, MODEL), alone(of, **own))]
    assert Costs(both(of, **own), places).compile_worker == max(workers)
    assert (workers[1] > workers[0]) == in_draft


def test_each_model_is_downloaded_to_where_it_belongs() -> None:
    """The model is in a directory, the draft on the hub."""
    found = both(model={"seed_for_random_weight": None})
    costs = Costs(found, Disks(STORE, STORE, {DRAFT: SourceState(HUB)}))
    needs = {need.what: need.parts for need in costs.disks(found.steps.values(), 1)}
    assert needs["/hub"] == {"download": parameters(alone(spec(**SPECULATIVE), model={"seed_for_random_weight": None}))}
    assert "download" not in needs["/store"]
