"""The number of KV blocks: given, what the largest decode bucket fills, or what the memory has room for."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_build.core.errors import UserError
from furiosa_build.core.system import Disk, Machine
from furiosa_build.plan.budget.costs import Disks
from furiosa_build.plan.budget.describe import kv_blocks_text
from furiosa_build.plan.budget.durations import Durations
from furiosa_build.plan.budget.placement import placement
from furiosa_build.plan.budget.preflight import preflight
from furiosa_build.plan.kv_blocks import KvBlocks, MemoryBudget
from furiosa_build.recipe.schema import BuildOptions, BuildSpec
from furiosa_build.steps.registry import STEPS

from .outlines import outline, plan, spec

GB = 10**9
STORE = Path("/store")
# Of the model in outlines.py in float32: embedding and head of 100 x 8, a norm of 8; layers of 8, 8 x 8 and 8 x 16.
FIRST, LAYER, LAST = 100 * 8 * 4, (8 + 8 * 8 + 8 * 16) * 4, (100 * 8 + 8) * 4
SLOT = 2 * (2 * 4) * 4
"""Keys and values of a token in a layer: heads, head size, float32. The runtime has a block more than it gives out."""


def derived(target: dict[str, Any], layers: int = 3, **sections: Any) -> KvBlocks:
    """Of one decode bucket, 4 x 64, in blocks of 16 tokens: 16 blocks fill it, 4 are one sequence."""
    return plan(recipe(target, **sections), outline(layers)).kv_blocks


def recipe(target: dict[str, Any], **sections: Any) -> BuildSpec:
    buckets = {"decode_buckets": [[4, 64]], "paged_attention_block_size": 16, "paged_attention_num_blocks": None}
    target = {"name": "npu", **target}
    return spec(target=target, **{**sections, "buckets": {**buckets, **sections.get("buckets", {})}})


def npu(memory: int, **others: Any) -> dict[str, Any]:
    """A target of 8 elements that have so many bytes each."""
    return {"num_elements": 8, "memory_gb": 8 * memory / GB, **others}


def shortages(of: BuildSpec) -> dict[str, tuple[int, int | None]]:
    found = plan(of)
    places = Disks(Disk(STORE, 1, None), Disk(STORE, 1, None))
    undone = dict.fromkeys(found.steps, True)
    figures = preflight(found, BuildOptions(), undone, places, Machine(2, 64 * GB, 60 * GB), Durations([], STEPS))
    return {
        short.requirement.what: (short.requirement.needed, short.requirement.available) for short in figures.shortages
    }


def test_what_the_largest_decode_bucket_fills_where_no_memory_is_stated() -> None:
    """Not even that of this host: an artifact is the same wherever it is built."""
    assert derived({"memory_gb": None}) == KvBlocks(16, "bucket", 16, None)
    buckets = {"decode_buckets": [[1, 128], [2, 32], [8, 32]]}
    assert derived({}, buckets=buckets).count == 16, "of 8 x 32, though 128 is longer"


def test_what_is_given_is_taken() -> None:
    found = derived({"memory_gb": 1e-6}, buckets={"paged_attention_num_blocks": 9})
    assert (found.count, found.source, found.needed) == (9, "given", 16)


@pytest.mark.parametrize(
    ("blocks", "count", "source"), [(40, 16, "bucket"), (16, 16, "bucket"), (15, 15, "memory"), (4, 4, "memory")]
)
def test_at_most_what_the_device_has_room_for_beside_the_parameters(blocks: int, count: int, source: str) -> None:
    parameters, block = FIRST + 3 * LAYER + LAST, 3 * 16 * SLOT
    of = recipe({"memory_gb": (parameters + (blocks + 1) * block) / GB})
    assert plan(of).kv_blocks == KvBlocks(
        count, source, 16, MemoryBudget(parameters + (blocks + 1) * block, parameters, block)
    )  # type: ignore[arg-type]
    assert shortages(of) == {}


@pytest.mark.parametrize("asked", ["int8", "fp8"])
def test_codes_leave_room_for_more_blocks(asked: str) -> None:
    """Heads of 4 numbers: 16 bytes in float32, 4 and a scale of 4 as codes."""
    parameters, block = FIRST + 3 * LAYER + LAST, 3 * 16 * SLOT
    target, buckets = {"memory_gb": (parameters + (5 + 1) * block) / GB}, {"kv_cache_dtype": asked}
    assert derived(target).count == 5
    assert derived(target, buckets=buckets, backend={"name": "native"}).count == 2 * (5 + 1) - 1


def test_other_backends_refuse_codes() -> None:
    with pytest.raises(UserError, match="backend eager has no KV caches of kv_cache_dtype='fp8'"):
        plan(recipe({}, buckets={"kv_cache_dtype": "fp8"}))


def test_an_element_has_its_share_and_the_fullest_stage_decides() -> None:
    """Two stages of two layers: the first has the embedding, the second norm and head, which are a little more."""
    room = (5 + 1) * 2 * 16 * SLOT
    memory = 2 * LAYER + LAST + room
    found = derived(npu(memory), layers=4, devices="npu:0:*", parallel={"pipeline_parallel_size": 2})
    assert (found.count, found.source) == (5, "memory")
    assert found.room == MemoryBudget(memory, 2 * LAYER + LAST, 2 * 16 * SLOT)


def test_replicas_on_a_cpu_share_its_memory() -> None:
    """Each element of an NPU has its own."""
    parameters, block = FIRST + 3 * LAYER + LAST, 3 * 16 * SLOT
    target, two = {"memory_gb": (2 * parameters + 2 * (7 + 1) * block) / GB}, {"data_parallel_size": 2}
    assert derived(target, parallel=two).count == 7
    of_each = npu(parameters + (7 + 1) * block)
    assert derived(of_each, devices="npu:0:*", parallel=two).count == 7


@pytest.mark.parametrize("devices", ["cpu", "npu:0:0-1"])
def test_where_not_one_sequence_has_room_the_build_is_refused(devices: str) -> None:
    parameters, block = FIRST + 3 * LAYER + LAST, 3 * 16 * SLOT
    room = parameters + (4 + 1) * block - 1
    of = recipe(npu(room) if devices != "cpu" else {"memory_gb": room / GB}, devices=devices)
    assert (plan(of).kv_blocks.count, plan(of).kv_blocks.source) == (4, "memory")
    [(what, figures)] = shortages(of).items()
    assert what == ("a device of target npu" if devices == "cpu" else "an element of target npu")
    assert figures == (room + 1, room)


@given(st.integers(1, 60_000), st.sampled_from(["cpu", "npu:0:*"]), st.sampled_from([1, 2]), st.sampled_from([1, 3]))
def test_what_is_derived_from_the_memory_fits_it(memory: int, devices: str, replicas: int, stages: int) -> None:
    """Or is one sequence, and refused."""
    parallel = {"pipeline_parallel_size": stages, "data_parallel_size": replicas}
    of = recipe(npu(memory), devices=devices, parallel=parallel)
    blocks = plan(of).kv_blocks
    refused = shortages(of)
    assert 4 <= blocks.count <= 16
    assert blocks.room is not None
    assert bool(refused) == (blocks.room.blocks < 4)
    if not refused:
        held = [element.parameters + element.kv_cache for element in placement(plan(of))]
        assert max(held) <= memory if devices != "cpu" else sum(held) <= 8 * memory


def test_what_a_person_is_told() -> None:
    parameters, block = FIRST + 3 * LAYER + LAST, 3 * 16 * SLOT
    assert kv_blocks_text(plan(recipe({}))) == "16 blocks of 16 tokens, derived: what the largest decode bucket fills"
    assert kv_blocks_text(plan(recipe({}, buckets={"paged_attention_num_blocks": 9}))) == (
        "9 blocks of 16 tokens, as given (what the largest decode bucket fills: 16)"
    )
    assert kv_blocks_text(plan(recipe({"memory_gb": 1}))).endswith("fills; the memory has room for 325516")
    assert kv_blocks_text(plan(recipe(npu(parameters + (5 + 1) * block), devices="npu:0:0"))) == (
        "5 blocks of 16 tokens, derived from the memory of target npu: (27.3 kB of an element - 8.83 kB of parameters) "
        "/ 3.07 kB a block, less one for padding: 5 (what the largest decode bucket fills: 16)"
    )
    assert "less one for padding: 0, too few for one sequence" in kv_blocks_text(
        plan(recipe(npu(5), devices="npu:0:0"))
    )


def test_plain_data_are_plain() -> None:
    assert asdict(derived({"memory_gb": 1}))["room"]["memory"] == GB
