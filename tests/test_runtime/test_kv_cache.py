from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from furiosa_build.runtime.kv_cache import BlockManager


def test_slots_follow_the_blocks() -> None:
    blocks = BlockManager(num_blocks=4, block_size=3)
    blocks.reserve("a", 4)
    assert blocks.slots("a").tolist() == [3, 4, 5, 6, 7, 8]
    blocks.reserve("b", 1)
    blocks.reserve("a", 7)
    assert blocks.slots("a").tolist() == [3, 4, 5, 6, 7, 8, 12, 13, 14]
    assert blocks.slots("a").dtype == np.int64


def test_reserving_more_than_there_is_changes_nothing() -> None:
    blocks = BlockManager(num_blocks=2, block_size=1)
    assert not blocks.can_reserve("a", 3)
    with pytest.raises(RuntimeError, match="3 blocks wanted, 2 free"):
        blocks.reserve("a", 3)
    assert blocks.owners() == set()
    assert blocks.num_free == 2


def test_freeing_what_nobody_owns() -> None:
    blocks = BlockManager(num_blocks=2, block_size=1)
    with pytest.raises(KeyError):
        blocks.free("a")


def test_check_integrity_finds_what_is_wrong() -> None:
    def broken() -> BlockManager:
        blocks = BlockManager(num_blocks=4, block_size=2)
        blocks.reserve("a", 3)
        return blocks

    lost, twice, scratch, slots = broken(), broken(), broken(), broken()
    lost._free.pop()
    twice._free.append(1)
    scratch._free.append(0)
    slots._tables["a"].slots = slots._tables["a"].slots[::-1]
    for blocks in (lost, twice, scratch):
        with pytest.raises(RuntimeError, match="lost or owned twice"):
            blocks.check_integrity()
    with pytest.raises(RuntimeError, match="disagree with its blocks"):
        slots.check_integrity()


class Blocks(RuleBasedStateMachine):
    """Against the simplest model there is: how many tokens each owner has."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.sampled_from([1, 2, 5, 16]))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.tokens: dict[str, int] = {}

    @rule(owner=st.sampled_from("abcd"), more=st.integers(1, 20))
    def grow(self, owner: str, more: int) -> None:
        wanted = self.tokens.get(owner, 0) + more
        before = list(self.blocks.slots(owner)) if owner in self.tokens else []
        others = sum(-(-n // self.blocks.block_size) for name, n in self.tokens.items() if name != owner)
        fits = others + -(-wanted // self.blocks.block_size) <= self.blocks.num_blocks
        assert self.blocks.can_reserve(owner, wanted) is fits
        if fits:
            self.blocks.reserve(owner, wanted)
            self.tokens[owner] = wanted
            assert list(self.blocks.slots(owner)[: len(before)]) == before  # what is written stays

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.tokens)))
        self.blocks.free(owner)
        del self.tokens[owner]

    @invariant()
    def no_slot_is_shared(self) -> None:
        if not hasattr(self, "blocks"):
            return
        self.blocks.check_integrity()
        slots = [slot for owner in self.tokens for slot in self.blocks.slots(owner).tolist()]
        assert len(slots) == len(set(slots))
        assert all(slot >= self.blocks.block_size for slot in slots)  # none in the scratch block
        assert all(len(self.blocks.slots(owner)) >= n for owner, n in self.tokens.items())


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
