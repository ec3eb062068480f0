"""How many KV blocks a layer has: as given; else what the largest decode bucket fills, or the memory has room for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from furiosa_build.devices import kind_of
from furiosa_build.plan.outline import Outline
from furiosa_build.plan.sizes import SCRATCH_BLOCKS, kv_slot_bytes, rank_parameter_bytes
from furiosa_build.recipe.schema import BuildSpec


@dataclass(frozen=True)
class Room:
    """Bytes of memory that a place has, that its parameters take there, and that one KV block of its layers takes."""

    memory: int
    parameters: int
    block: int

    @property
    def blocks(self) -> int:
        """How many fit beside the parameters, and the one for padding."""
        return max(0, (self.memory - self.parameters) // max(1, self.block) - SCRATCH_BLOCKS)


@dataclass(frozen=True)
class KvBlocks:
    """The number of KV blocks of a layer, and what it follows from.

    Attributes:
        count: How many.
        source: `given` in the recipe; what the largest decode `bucket` fills; or fewer, for the `memory` has no more
            room. Never fewer than one sequence fills: where these do not fit, the build is refused.
        needed: What the largest decode bucket fills.
        room: Where the memory is tightest; None: the target does not say how much it has.
    """

    count: int
    source: Literal["given", "bucket", "memory"]
    needed: int
    room: Room | None


def find_kv_blocks(
    spec: BuildSpec, outline: Outline, stages: Sequence[Sequence[int]], schemes: Mapping[str, str]
) -> KvBlocks:
    """The KV blocks. `stages` has the layers of each, `schemes` the scheme of every quantized parameter."""
    buckets = spec.buckets
    room = min(_rooms(spec, outline, stages, schemes), key=lambda room: (room.blocks, -room.parameters), default=None)
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


def _rooms(
    spec: BuildSpec, outline: Outline, stages: Sequence[Sequence[int]], schemes: Mapping[str, str]
) -> list[Room]:
    """That of an element of each stage; or of the one device that holds all."""
    ranks = spec.parallel.tensor_parallel_size
    parameters = [rank_parameter_bytes(outline, stages, stage, ranks, schemes) for stage in range(len(stages))]
    blocks = [spec.buckets.paged_attention_block_size * kv_slot_bytes(outline, layers, ranks) for layers in stages]
    if spec.target.memory_gb is None:
        return []
    share = element_memory(spec)
    if share is not None:
        return [Room(share, *of_stage) for of_stage in zip(parameters, blocks, strict=True)]
    copies = spec.data_parallel_size * ranks
    return [Room(int(spec.target.memory_gb * 1e9), copies * sum(parameters), copies * sum(blocks))]
