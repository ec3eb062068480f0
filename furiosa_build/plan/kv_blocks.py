"""How many KV blocks a layer has: as given; else what the largest decode bucket fills, or the memory has room for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

from furiosa_build.core.devices import kind_of
from furiosa_build.plan.budget.sizes import SCRATCH_BLOCKS, kv_slot_bytes, rank_parameter_bytes
from furiosa_build.recipe.schema import BuildSpec

if TYPE_CHECKING:
    from furiosa_build.plan.model import ModelPlan


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that an element or a device has, that parameters take of it, and that one KV block of its layers takes.

    The draft model's parameters and KV blocks, if there is one, are counted as well.
    """

    memory: int
    parameters: int
    block: int

    @property
    def blocks(self) -> int:
        """The number of KV blocks that fit beside the parameters and the block for padding."""
        return max(0, (self.memory - self.parameters) // max(1, self.block) - SCRATCH_BLOCKS)


@dataclass(frozen=True)
class KvBlocks:
    """The number of KV blocks of a layer, and what it follows from.

    Attributes:
        count: The number.
        source: `given` in the recipe; what the largest decode `bucket` fills; or fewer, for the `memory` has no more
            room. Never fewer than one sequence fills: where these do not fit, the build is refused.
        needed: What the largest decode bucket fills.
        room: Where the memory is tightest; None: the target does not say how much it has.
    """

    count: int
    source: Literal["given", "bucket", "memory"]
    needed: int
    room: MemoryBudget | None


def find_kv_blocks(model: ModelPlan, draft: ModelPlan | None = None) -> KvBlocks:
    """The KV blocks of `model`; `draft`, which lies on the same elements, has as many."""
    buckets = model.spec.buckets
    budgets = _memory_budgets(model.spec, _shares(model), [] if draft is None else _shares(draft))
    room = min(budgets, key=lambda budget: (budget.blocks, -budget.parameters), default=None)
    if buckets.paged_attention_num_blocks is not None:
        return KvBlocks(buckets.paged_attention_num_blocks, "given", buckets.needed_blocks, room)
    if room is None or room.blocks >= buckets.needed_blocks:
        return KvBlocks(buckets.needed_blocks, "bucket", buckets.needed_blocks, room)
    return KvBlocks(max(room.blocks, buckets.least_blocks), "memory", buckets.needed_blocks, room)


def element_memory(spec: BuildSpec) -> int | None:
    """Bytes that one element has for itself: its share of the device. None: unknown, or all elements are on one CPU."""
    if spec.target.memory_gb is None or kind_of(spec.devices) != "npu":
        return None
    return int(spec.target.memory_gb * 1e9) // spec.target.num_elements


def _shares(model: ModelPlan) -> list[tuple[int, int]]:
    """Bytes of the parameters and of a KV block of each element of a replica: stage by stage, rank by rank."""
    slots = model.spec.buckets.paged_attention_block_size
    of_stages = [
        (
            rank_parameter_bytes(model.outline, model.stages, stage, model.ranks, model.schemes),
            slots * kv_slot_bytes(model.outline, layers, model.ranks, model.spec.buckets.kv_cache_dtype),
        )
        for stage, layers in enumerate(model.stages)
    ]
    return [of_stage for of_stage in of_stages for _ in range(model.ranks)]


def _memory_budgets(
    spec: BuildSpec, shares: list[tuple[int, int]], of_draft: list[tuple[int, int]]
) -> list[MemoryBudget]:
    """The memory of each element of a replica; or of the one device that holds all."""
    if spec.target.memory_gb is None:
        return []
    both = [
        (parameters + more, block + more_block)
        for (parameters, block), (more, more_block) in zip_longest(shares, of_draft, fillvalue=(0, 0))
    ]
    share = element_memory(spec)
    if share is not None:
        return [MemoryBudget(share, *of_element) for of_element in both]
    parameters, blocks = (spec.data_parallel_size * sum(each) for each in zip(*both, strict=True))
    return [MemoryBudget(int(spec.target.memory_gb * 1e9), parameters, blocks)]
