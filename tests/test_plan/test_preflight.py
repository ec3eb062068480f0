"""Figures before a build, and what is refused: for plans, disks and machines made by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_build.core.system import Disk, Machine
from furiosa_build.plan.budget.costs import Disks, SourceState
from furiosa_build.plan.budget.preflight import Preflight
from furiosa_build.plan.budget.sizes import parameter_bytes
from furiosa_build.plan.planner import Plan

from .figures import (
    COMPILE_WORKER,
    COMPILING,
    FP8,
    FROM_HUB,
    GB,
    INDUCTOR,
    INT8,
    JUDGE,
    OUTPUT,
    PROBE,
    STORE,
    WORKER,
    figures,
    places,
    refused,
    remedies,
)
from .outlines import model_plan, outline, plan, spec

# Disk


def parts(found: Preflight) -> dict[str, set[str]]:
    return {need.what: set(need.parts) for need in found.disks}


@pytest.mark.parametrize("quantization", [{}, FP8, INT8], ids=["none", "fp8", "int8"])
def test_parameters_are_written_once(quantization: dict[str, str]) -> None:
    built = plan(spec(quantization=quantization))
    (disk,) = figures(built).disks
    assert parts(figures(built)) == {"/store": {"parameters", "programs"}}
    assert (
        parameter_bytes(built.model) < disk.parts["parameters"] < parameter_bytes(built.model) + 200 * 40
    )  # and file headers


def test_a_copy_for_an_artifact_on_another_disk() -> None:
    found = figures(plan(), places(output=60 * GB))
    assert parts(found) == {"/store": {"parameters", "programs"}, "/artifacts": {"a copy for the artifact"}}
    store, output = found.disks
    assert output.needed == store.parts["parameters"]


def test_a_download_is_counted_where_the_hubs_cache_is() -> None:
    built = plan(spec(model=FROM_HUB, quantization=FP8))
    source = parameter_bytes(model_plan())
    assert figures(built, places(hub=60 * GB)).disks[1].parts == {"download": source}
    assert figures(built, places(hub=60 * GB, cached=source - 5)).disks[1].parts == {"download": 5}
    assert len(figures(built, places(hub=60 * GB, cached=source + 5)).disks) == 1


def test_what_shares_a_disk_is_added_up() -> None:
    built = plan(spec(model=FROM_HUB))
    one = Disk(STORE, 1, 60 * GB)
    (disk,) = figures(built, Disks(one, one, {"": SourceState(one)})).disks
    assert set(disk.parts) == {"parameters", "programs", "download"}


def test_only_steps_that_are_to_do_count() -> None:
    found = figures(plan(), places(output=60 * GB), steps=["package", "qualify"])
    assert parts(found) == {"/artifacts": {"a copy for the artifact"}}
    assert found.programs == 0
    nothing = figures(plan(), places(0, 0), Machine(1, 0, 0), steps=[])
    assert (nothing.read, nothing.written, nothing.disks, nothing.memory.needed) == (0, 0, (), 0)
    assert refused(nothing) == {}


def test_a_disk_that_is_one_byte_too_small() -> None:
    (disk,) = figures(plan()).disks
    assert refused(figures(plan(), places(disk.needed))) == {}
    found = figures(plan(), places(disk.needed - 1))
    assert refused(found) == {"/store": (disk.needed, disk.needed - 1)}
    assert "cache_dir=DIRECTORY" in remedies(found)
    assert "quantization=fp8" in remedies(found)
    assert "quantization" not in remedies(figures(plan(spec(quantization=FP8)), places(0)))


def test_each_disk_is_refused_with_what_helps_there() -> None:
    built = plan(spec(model=FROM_HUB))
    found = figures(built, places(output=1, hub=1))
    assert set(refused(found)) == {"/artifacts", "/hub"}
    assert "save_dir=DIRECTORY" in remedies(found)
    assert "HF_HUB_CACHE=DIRECTORY" in remedies(found)
    assert "cache_dir" not in remedies(found)


def test_a_disk_that_does_not_say_is_not_refused() -> None:
    assert refused(figures(plan(), places(None))) == {}


def test_for_a_step_that_may_be_up_to_date_nothing_is_refused() -> None:
    built = plan(spec(quantization=FP8))
    found = figures(built, places(1000), perhaps=["quantize", *(n for n in built.steps if n.startswith("compile"))])
    assert found.disks[0].needed > 1000, "the plan shows all that may be needed"
    assert set(refused(found)) == {"/store"}, "the graphs do not fit either"
    graphs = sum(found.work[name].written for name in built.steps if name.startswith("partition:"))
    assert refused(found)["/store"][0] == graphs
    assert refused(figures(built, places(graphs), perhaps=["quantize", *built.steps])) == {}


# What is read and written


def test_bytes_of_every_step() -> None:
    built = plan(spec(model=FROM_HUB, quantization=FP8))
    source, files = parameter_bytes(model_plan()), figures(built).disks[0].parts["parameters"]
    found = figures(built, Disks(Disk(STORE, 1, GB), Disk(OUTPUT, 2, GB), {"": SourceState(unread=77)})).work
    weights = {name: (work.read, work.written) for name, work in found.items() if ":" not in name or "weights" in name}
    assert weights == {
        "fetch": (77, 0),
        "quantize": (source, files),
        "partition:weights": (0, 0),
        "package": (files, files),
        "qualify": (2 * files, 0),
    }


def test_weights_that_are_drawn_are_not_read() -> None:
    found = figures(plan()).work
    assert (found["fetch"].read, found["quantize"].written, found["partition:weights"].read) == (0, 0, 0)
    assert found["partition:weights"].written > 0


def test_sums() -> None:
    found = figures(plan(spec(model=FROM_HUB)))
    assert found.read == sum(work.read for work in found.work.values()) > 0
    assert found.written == sum(work.written for work in found.work.values()) == found.disks[0].needed
    assert found.programs == sum(name.startswith("compile") for name in found.work) == 6


# Memory


def test_workers_side_by_side() -> None:
    built = plan(spec(backend=INDUCTOR))
    found = figures(built, steps=COMPILING, num_compile_workers=3, num_pipeline_builder_workers=2).memory
    assert found.parts == {"tracing": 2 * WORKER, "compiling": 3 * COMPILE_WORKER}


def test_no_more_workers_than_there_is_work() -> None:
    built = plan(spec(backend=INDUCTOR))
    found = figures(built, steps=COMPILING[:1], num_compile_workers=9, num_pipeline_builder_workers=9).memory
    assert sum(found.parts.values()) in (WORKER, COMPILE_WORKER)


def large(**sections: object) -> Plan:
    """A model whose head is 800 MB, and a layer's largest weight 1 GB: weights count more than processes."""
    model = outline()
    sizes = {"lm_head.weight": [25000, 8000], "mlp.down_proj.weight": [25000, 10000]}
    changed = {
        name: parameter.model_copy(update={"shape": shape})
        for name, parameter in model.parameters.items()
        for ending, shape in sizes.items()
        if name.endswith(ending)
    }
    return plan(spec(**sections), model.model_copy(update={"parameters": {**model.parameters, **changed}}))


HEAD, DOWN = 25000 * 8000 * 4, 25000 * 10000 * 4
REST = (100 * 8 + 8) * 4  # embedding and norm
LAYER = DOWN + (8 * 8 + 8) * 4


@pytest.mark.parametrize(
    ("sections", "step", "held"),
    [
        ({"model": FROM_HUB}, "partition:weights", 0),
        ({}, "partition:weights", DOWN),
        ({}, "quantize", 0),
        ({"model": FROM_HUB, "quantization": FP8}, "quantize", DOWN // 4 + 25000 * 4),
        ({"quantization": FP8}, "quantize", DOWN + DOWN // 4 + 25000 * 4),
        ({"quantization": FP8}, "partition:weights", 0),
    ],
)
def test_a_weight_is_held_unless_it_is_mapped(sections: dict[str, object], step: str, held: int) -> None:
    found = figures(large(**sections), steps=[step]).memory
    assert found.needed == WORKER + held


PROMPT = 2 * 64**2 * 2 * 4 + 4 * 64 * 25000 * 4
"""Scores of two heads over the longest bucket, before and after their softmax; the widest numbers of a layer."""
LOGITS = 3 * (48 + 2 * 4) * 100 * 4
TEXT = 3 * 1024 * 100 * 4


@pytest.mark.parametrize(
    ("sections", "held"),
    [
        ({"model": FROM_HUB}, PROBE),
        ({}, HEAD + REST + LAYER + PROMPT + LOGITS),
        # What is quantized: neither head nor norm.
        ({"model": FROM_HUB, "quantization": FP8}, LAYER - 8 * 4 + PROMPT + TEXT),
        ({"quantization": {"scheme": "fp8", "rules": []}}, LAYER - 8 * 4 + HEAD + PROMPT + TEXT),
    ],
)
def test_the_reference_holds_one_layer_of_what_is_not_mapped(sections: dict[str, object], held: int) -> None:
    """And what it computes."""
    assert figures(large(**sections), steps=["qualify"]).memory.needed == WORKER + JUDGE + held


def test_the_reference_attends_to_no_longer_prompt_than_it_must() -> None:
    """Where there is no memory for more, prompts have 256 tokens."""
    sizes = {"prefill_buckets": [[1, 4096]], "decode_buckets": [[1, 4096]], "paged_attention_num_blocks": 4096}
    buckets = {**sizes, "max_seq_len_to_capture": 4096}
    built = plan(spec(model=FROM_HUB, buckets=buckets))
    model = dataclasses.replace(built.model, hf_config={**built.model.hf_config, "num_attention_heads": 512})
    many = dataclasses.replace(built, models={"": model})
    scores = 512 * 256**2 * 2 * 4
    assert scores < figures(many, steps=["qualify"]).memory.parts["qualification"] - JUDGE < scores + 10**6


def machine(available: int, swap: int = 0) -> Machine:
    return Machine(cores=2, memory=64 * GB, available=available, swap=swap)


def workers(available: int | None, asked: int = 4, steps: Iterable[str] | None = COMPILING) -> int:
    built = plan(spec(backend=INDUCTOR))
    has = Machine(2, None, None) if available is None else machine(available)
    return figures(built, machine=has, steps=steps, num_compile_workers=asked).compile_workers


@pytest.mark.parametrize("fitting", [1, 2, 3, 4])
def test_as_many_compile_workers_as_the_memory_allows(fitting: int) -> None:
    enough = WORKER + fitting * COMPILE_WORKER
    assert workers(enough) == fitting
    assert workers(enough - 1) == max(1, fitting - 1)


def test_workers_are_as_asked_where_nothing_compiles_or_the_memory_is_unknown() -> None:
    assert workers(None) == 4
    assert workers(0, steps=["package"]) == 4
    assert workers(0, steps=["partition:weights"]) == 4


@given(st.integers(0, 20 * GB), st.integers(1, 32), st.integers(0, 4 * GB))
def test_workers_are_never_none_never_more_than_asked_and_grow_with_memory(
    available: int, asked: int, more: int
) -> None:
    assert 1 <= workers(available, asked) <= workers(available + more, asked) <= asked
    assert workers(available, asked) <= workers(available, asked + 1)


def test_memory_is_refused_when_one_worker_of_each_kind_does_not_fit() -> None:
    built = plan(spec(backend=INDUCTOR))
    enough = WORKER + COMPILE_WORKER
    many = {"num_compile_workers": 8, "num_pipeline_builder_workers": 8}
    assert refused(figures(built, machine=machine(enough), steps=COMPILING, **many)) == {}
    found = figures(built, machine=machine(enough - 1), steps=COMPILING, **many)
    assert refused(found) == {"memory": (enough, enough - 1)}


def test_swapping_is_slow_but_not_refused() -> None:
    built = plan(spec(backend=INDUCTOR))
    found = figures(built, machine=machine(WORKER, swap=COMPILE_WORKER), steps=COMPILING, num_compile_workers=2)
    assert (refused(found), found.compile_workers) == ({}, 1)


def test_memory_is_not_refused_where_it_is_unknown() -> None:
    assert refused(figures(plan(spec(backend=INDUCTOR)), machine=Machine(1, None, None))) == {}


def test_memory_is_not_refused_for_what_may_be_up_to_date() -> None:
    built = plan(spec(backend=INDUCTOR))
    heavy = [name for name in built.steps if not name.startswith("partition:decode")]
    assert refused(figures(built, machine=machine(WORKER), perhaps=heavy)) == {}


# Growing


def total(of: Plan) -> tuple[int, ...]:
    found = figures(of, places(output=60 * GB))
    return found.read, found.written, found.device.needed, found.memory.needed, *(disk.needed for disk in found.disks)


lengths = st.lists(st.integers(1, 128), min_size=1, max_size=4, unique=True)


@given(lengths, lengths, st.sampled_from([{}, FP8, INT8]))
def test_buckets_cost_something(some: list[int], more: list[int], quantization: dict[str, str]) -> None:
    def of(found: list[int]) -> Plan:
        buckets = {"decode_buckets": [[1, length] for length in sorted(found)], "paged_attention_num_blocks": None}
        return plan(spec(buckets=buckets, quantization=quantization))

    fewer, all_of_them = total(of(some)), total(of([*some, *(length for length in more if length not in some)]))
    assert all(one <= other for one, other in zip(fewer, all_of_them, strict=True))


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([{}, FP8, INT8]))
def test_layers_cost_something(layers: int, more: int, quantization: dict[str, str]) -> None:
    few, many = (total(plan(spec(quantization=quantization), outline(count))) for count in (layers, layers + more))
    assert all(one <= other for one, other in zip(few, many, strict=True))
    assert few[:3] < many[:3]


@given(st.integers(0, 100_000), st.integers(0, 100_000), st.sampled_from([{}, FP8]))
def test_what_fits_a_small_machine_fits_a_larger_one(small: int, more: int, quantization: dict[str, str]) -> None:
    def found(size: int) -> Preflight:
        has = Machine(2, memory=size, available=WORKER * 3 - 50_000 + size)
        return figures(plan(spec(quantization=quantization)), places(size, size), has)

    assert set(refused(found(small + more))) <= set(refused(found(small)))


def test_constants_in_programs_are_written_once_for_each_bucket_and_held_in_memory() -> None:
    usual = plan(spec(backend=INDUCTOR))
    held = plan(spec(backend=INDUCTOR, rewriting={"embed_all_constants_into_graph": True}))
    assert len(held.model.buckets) == 2
    layers = sum(name.startswith("compile") for name in held.steps) - sum(n.startswith("compile") for n in usual.steps)
    [before], [after] = figures(usual).disks, figures(held).disks
    # What else a program takes is counted for each; there is one for every layer now.
    more = layers * (500_000 + 20_000)
    assert after.parts["programs"] == before.parts["programs"] + 2 * parameter_bytes(held.model) + more
    largest = 100 * 8 * 4 + 8 * 4  # the head and its norm, float32
    compiling = figures(held, steps=[name for name in held.steps if name != "qualify"]).memory
    assert compiling.parts["compiling"] == COMPILE_WORKER + 4 * largest
