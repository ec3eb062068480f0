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
    assert blocks.missing("a", 3) == 3
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
        with pytest.raises(RuntimeError, match="lost, or free and owned"):
            blocks.check_integrity()
    miscounted = broken()
    miscounted._counts[1] = 2
    with pytest.raises(RuntimeError, match="counted are"):
        miscounted.check_integrity()
    with pytest.raises(RuntimeError, match="disagree with its blocks"):
        slots.check_integrity()


def test_a_fork_shares_the_beginning_and_goes_on_in_blocks_of_its_own() -> None:
    blocks = BlockManager(num_blocks=6, block_size=4)
    blocks.reserve("a", 6)
    blocks.fork("a", "b", 6)
    assert blocks.num_free == 4
    blocks.reserve("a", 7)
    assert blocks.num_free == 4, "the source has room in its last block"
    assert blocks.missing("b", 6) == 0
    blocks.reserve("b", 7)
    blocks.check_integrity()
    assert blocks.slots("a").tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert blocks.slots("b").tolist() == [4, 5, 6, 7, 8, 9, 12, 13, 14, 15]
    blocks.fork("b", "c", 8)
    blocks.free("b")
    blocks.free("a")
    blocks.check_integrity()
    assert blocks.num_free == 3, "c still has the blocks that began as those of a and of b"
    blocks.free("c")
    assert blocks.num_free == 6


def test_what_cannot_be_forked() -> None:
    blocks = BlockManager(num_blocks=6, block_size=4)
    blocks.reserve("a", 6)
    with pytest.raises(RuntimeError, match="'a' has 8 slots, not 9"):
        blocks.fork("a", "b", 9)
    with pytest.raises(RuntimeError, match="'a' has blocks already"):
        blocks.fork("a", "a", 3)
    with pytest.raises(KeyError):
        blocks.fork("nobody", "b", 3)
    blocks.check_integrity()


class Blocks(RuleBasedStateMachine):
    """Against the simplest model there is: what each owner has written where."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.sampled_from([1, 2, 5, 16]))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.tokens: dict[str, list[int]] = {}
        self.storage: dict[int, int] = {}
        self.written = 0

    @rule(owner=st.sampled_from("abcd"), more=st.integers(1, 20))
    def grow(self, owner: str, more: int) -> None:
        """The owner reserves and writes numbers that nobody has written."""
        tokens = self.tokens.get(owner, [])
        wanted = len(tokens) + more
        missing, free = self.blocks.missing(owner, wanted), self.blocks.num_free
        if missing > free:
            with pytest.raises(RuntimeError, match="blocks wanted"):
                self.blocks.reserve(owner, wanted)
            return
        self.blocks.reserve(owner, wanted)
        assert self.blocks.num_free == free - missing
        slots = self.blocks.slots(owner).tolist()
        new = list(range(self.written, self.written + more))
        self.written += more
        self.storage.update(zip(slots[len(tokens) : wanted], new, strict=True))
        self.tokens[owner] = [*tokens, *new]

    @precondition(lambda self: self.tokens and len(self.tokens) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source = data.draw(st.sampled_from(sorted(self.tokens)))
        target = min(set("abcd") - set(self.tokens))
        number, free = data.draw(st.integers(0, len(self.tokens[source]))), self.blocks.num_free
        self.blocks.fork(source, target, number)
        self.tokens[target] = self.tokens[source][:number]
        assert self.blocks.num_free == free

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.tokens)))
        self.blocks.free(owner)
        del self.tokens[owner]
        if not self.tokens:
            assert self.blocks.num_free == self.blocks.num_blocks

    @invariant()
    def everyone_reads_what_it_wrote(self) -> None:
        if not hasattr(self, "blocks"):
            return
        self.blocks.check_integrity()
        assert self.blocks.owners() == set(self.tokens)
        for owner, tokens in self.tokens.items():
            slots = self.blocks.slots(owner).tolist()
            assert [self.storage[slot] for slot in slots[: len(tokens)]] == tokens
            assert all(slot >= self.blocks.block_size for slot in slots)  # none in the scratch block


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
