from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from furiosa_build.runtime.scheduling.kv_cache import BlockManager


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
    with pytest.raises(RuntimeError, match="are inconsistent with its blocks"):
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


def write(blocks: BlockManager, owner: str, tokens: list[int]) -> list[int]:
    """Computes all tokens of an owner; returns its blocks."""
    blocks.reserve(owner, len(tokens))
    blocks.cache_full_blocks(owner, tokens, len(tokens))
    blocks.check_integrity()
    return blocks._tables[owner].blocks


def test_blocks_of_nobody_are_free_and_cached_until_they_are_evicted() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2)
    written = write(blocks, "a", [5, 6, 7, 8, 9])
    assert blocks.find_cached([5, 6, 7, 8, 9, 1], 6) == written[:2], "the third is not full"
    assert blocks.find_cached([5, 6, 7, 8, 9, 1], 3) == written[:1]
    assert blocks.find_cached([6, 6, 7, 8], 4) == blocks.find_cached([5], 1) == []
    blocks.free("a")
    assert blocks.num_free == 4
    found = blocks.find_cached([5, 6, 7, 8], 4)
    assert blocks.num_evictable(found) == 2
    blocks.adopt("b", found)
    assert (found, blocks.num_free, blocks.num_evictable(found)) == (written[:2], 2, 0)
    assert blocks.slots("b").tolist() == [2, 3, 4, 5]
    blocks.adopt("c", found[:1])
    blocks.free("b")
    blocks.check_integrity()
    assert (blocks.num_free, blocks.num_evictable(found)) == (3, 1)
    blocks.reserve("d", 6)
    assert blocks.find_cached([5, 6, 7, 8], 4) == written[:1], "the second was needed, c has the first"
    with pytest.raises(RuntimeError, match="'c' has blocks already"):
        blocks.adopt("c", found[:1])


def test_those_that_were_used_longest_ago_are_forgotten_first() -> None:
    blocks = BlockManager(num_blocks=6, block_size=1)
    for owner, tokens in (("a", [1, 2]), ("b", [3, 4]), ("c", [5, 6])):
        write(blocks, owner, tokens)
        blocks.free(owner)
    blocks.adopt("again", blocks.find_cached([1, 2], 1))
    blocks.free("again")

    def cached() -> list[int]:
        return [len(blocks.find_cached(tokens, 2)) for tokens in ([1, 2], [3, 4], [5, 6])]

    # Of the first only one block was used again; what follows a block goes before it.
    for number, expected in enumerate(([2, 2, 2], [1, 2, 2], [1, 1, 2], [1, 0, 2], [1, 0, 1], [1, 0, 0], [0, 0, 0])):
        blocks.reserve("more", number)
        blocks.check_integrity()
        assert cached() == expected


def test_equal_hashes_of_different_tokens_are_no_hit() -> None:
    one, other = [1, 0], [1, 2**61 - 1]
    assert hash(tuple(one)) == hash(tuple(other))
    blocks = BlockManager(num_blocks=4, block_size=2)
    written = write(blocks, "a", one)
    assert blocks.find_cached(other, 2) == []
    assert write(blocks, "b", other) != written
    assert (blocks.find_cached(one, 2), blocks.find_cached(other, 2)) == ([1], [2])


def test_a_block_is_cached_under_all_tokens_before_it() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    write(blocks, "a", [1, 2, 3, 4])
    write(blocks, "b", [9, 9, 3, 4])
    assert blocks.find_cached([1, 2, 3, 4], 4) == [1, 2]
    assert blocks.find_cached([9, 9, 3, 4], 4) == [3, 4]
    assert blocks.find_cached([3, 4], 2) == []


def test_of_equal_blocks_one_is_kept() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    blocks.reserve("a", 5)
    blocks.reserve("b", 5)
    blocks.fork("b", "c", 3)
    before = blocks.slots("c").tolist()
    blocks.cache_full_blocks("a", [1, 2, 3, 4, 5], 5)
    blocks.cache_full_blocks("b", [1, 2, 3, 4, 6], 5)
    blocks.check_integrity()
    assert blocks.slots("a").tolist()[:4] == blocks.slots("b").tolist()[:4]
    assert blocks.slots("b")[4] != blocks.slots("a")[4]
    assert blocks.slots("c").tolist() == before, "until its own are cached"
    blocks.cache_full_blocks("c", [1, 2, 3], 3)
    assert blocks.slots("c").tolist()[:2] == blocks.slots("a").tolist()[:2]
    # a: 3, b: 1 more, and the block that c has still a token in
    assert blocks.num_free == 3


def test_check_integrity_finds_what_is_wrong_with_cached_blocks() -> None:
    def broken() -> BlockManager:
        blocks = BlockManager(num_blocks=4, block_size=1)
        write(blocks, "a", [1, 2, 3])
        blocks.free("a")
        return blocks

    key, child, order, table = broken(), broken(), broken(), broken()
    key._keys.pop(3)
    child._evict_oldest()
    child._free.append(3)
    del child._evictable[1], child._cached[child._keys.pop(1)]
    child._free.append(1)
    order._evictable.move_to_end(3)
    table.adopt("b", [1, 2])
    table._tables["b"].num_cached = 1
    table._keys[1], table._cached = (2, (1,)), {**table._cached, (2, (1,)): 1}
    del table._cached[0, (1,)]
    for blocks, message in (
        (key, "inconsistent"),
        (child, "2 is cached after 1, which is not cached"),
        (order, "2 would be evicted before 3"),
        (table, "do not follow each other"),
    ):
        with pytest.raises(RuntimeError, match=message):
            blocks.check_integrity()


class Blocks(RuleBasedStateMachine):
    """Against the simplest model there is: what each owner has written where."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.sampled_from([1, 2, 5, 16]), cached=st.booleans())
    def start(self, num_blocks: int, block_size: int, cached: bool) -> None:
        self.blocks = BlockManager(num_blocks, block_size)
        self.cached = cached
        self.tokens: dict[str, list[int]] = {}
        self.storage: dict[int, list[int]] = {}

    @rule(owner=st.sampled_from("abcd"), new=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def grow(self, owner: str, new: list[int]) -> None:
        """The owner reserves and writes: with each token all those before it, as keys and values depend on them."""
        tokens = self.tokens.get(owner, [])
        wanted = [*tokens, *new]
        missing, free = self.blocks.missing(owner, len(wanted)), self.blocks.num_free
        if missing > free:
            with pytest.raises(RuntimeError, match="blocks wanted"):
                self.blocks.reserve(owner, len(wanted))
            return
        self.blocks.reserve(owner, len(wanted))
        assert self.blocks.num_free == free - missing
        slots = self.blocks.slots(owner).tolist()
        self.storage.update((slots[place], wanted[: place + 1]) for place in range(len(tokens), len(wanted)))
        self.tokens[owner] = wanted
        if self.cached:
            self.blocks.cache_full_blocks(owner, wanted, len(wanted))
            assert self.blocks.num_free >= free - missing

    @precondition(lambda self: len(self.tokens) < 4)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def adopt(self, tokens: list[int]) -> None:
        found = self.blocks.find_cached(tokens, len(tokens))
        target = min(set("abcd") - set(self.tokens))
        free, unused = self.blocks.num_free, self.blocks.num_evictable(found)
        self.blocks.adopt(target, found)
        assert self.blocks.num_free == free - unused
        self.tokens[target] = tokens[: len(found) * self.blocks.block_size]

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

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.tokens)))
        free = self.blocks.num_free
        self.blocks.invalidate(owner)
        assert self.blocks.num_free == free
        slots = set(self.blocks.slots(owner).tolist())
        found = self.blocks.find_cached(self.tokens[owner], len(self.tokens[owner]))
        assert not slots & {block * self.blocks.block_size for block in found}

    @invariant()
    def everyone_reads_what_it_wrote(self) -> None:
        if not hasattr(self, "blocks"):
            return
        self.blocks.check_integrity()
        assert self.blocks.owners() == set(self.tokens)
        for owner, tokens in self.tokens.items():
            slots = self.blocks.slots(owner).tolist()
            read = [self.storage[slot] for slot in slots[: len(tokens)]]
            assert read == [tokens[: place + 1] for place in range(len(tokens))]
            assert all(slot >= self.blocks.block_size for slot in slots)  # none in the scratch block


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
