"""KV blocks: who owns which, and which are cached. A slot holds one token: slot = block * block_size + offset.

A full block is cached under its tokens and the block before it, which is cached in the same way: so under all tokens up
to its end. Of equal blocks one is cached. It stays so when no table has it any more, until it is evicted.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, takewhile

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]

_Key = tuple[int, tuple[int, ...]]
_NONE = 0
"""The block before the first: the scratch block, which no table has."""


@dataclass
class BlockTable:
    """The blocks of one sequence in order, and the same spelled out as slots: token i lives in slots[i].

    Of a block that was not this table's own at first it may have only the first slots. The first `num_cached` blocks
    are full and cached.
    """

    blocks: list[int] = field(default_factory=list)
    slots: Slots = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    num_cached: int = 0


class BlockManager:
    """Hands out KV blocks 1 to num_blocks to sequences. Sequences with equal beginnings may share the blocks of these.

    An owner is any hashable value. Block 0 is scratch: padding writes there. So the caches need
    (num_blocks + 1) * block_size slots.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last, likely still in the processor's cache, is reused first.
        self._free = list(range(num_blocks, 0, -1))
        self._tables: dict[Hashable, BlockTable] = {}
        # How many tables have a block; those that none has are not in it.
        self._counts: dict[int, int] = {}
        # (the block before, or 0, and the block's tokens) -> block. A dict compares keys, whatever their hashes.
        self._cached: dict[_Key, int] = {}
        self._keys: dict[int, _Key] = {}
        # Cached blocks that no table has, the most recently used at the end. A block is freed after those that follow
        # it, and used whenever they are: so it stands behind them here, and no cached block loses its beginning.
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """The number of blocks that no table has. Those of them that are cached are evicted when they are taken."""
        return len(self._free) + len(self._evictable)

    def blocks_for(self, num_tokens: int) -> int:
        """The number of blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def missing(self, owner: Hashable, num_tokens: int) -> int:
        """The number of free blocks that `reserve` would take."""
        table = self._tables.get(owner)
        return self.blocks_for(max(0, num_tokens - (len(table.slots) if table else 0)))

    def reserve(self, owner: Hashable, num_tokens: int) -> None:
        """Gives `owner` slots for its first `num_tokens` tokens, those included that it has already.

        Raises:
            RuntimeError: Too few free blocks; nothing has changed. Ask `missing` first.
        """
        missing = self.missing(owner, num_tokens)
        if missing > self.num_free:
            raise RuntimeError(f"{missing} blocks wanted, {self.num_free} free")
        table = self._tables.setdefault(owner, BlockTable())
        if missing > 0:
            new = [self._free.pop() if self._free else self._evict_oldest() for _ in range(missing)]
            self._counts.update((block, 1) for block in new)
            table.blocks += new
            table.slots = np.concatenate([table.slots, self._slots_of(new)])

    def fork(self, source: Hashable, target: Hashable, num_tokens: int) -> None:
        """Gives `target`, which has none, the slots of the first `num_tokens` tokens of `source`. Nothing is copied.

        The rest of a block that they share stays the source's: the target's next token takes a block of its own.
        """
        if target in self._tables:
            raise RuntimeError(f"{target!r} has blocks already")
        slots = self._tables[source].slots[:num_tokens]
        if len(slots) < num_tokens:
            raise RuntimeError(f"{source!r} has {len(slots)} slots, not {num_tokens}")
        begun = np.diff(slots // self.block_size, prepend=0).nonzero()[0]
        blocks = self._tables[source].blocks[: len(begun)]
        for block in blocks:
            self._counts[block] += 1
        cached = min(self._tables[source].num_cached, num_tokens // self.block_size)
        self._tables[target] = BlockTable(blocks, slots, cached)

    def find_cached(self, tokens: Sequence[int], limit: int) -> list[int]:
        """The cached blocks that begin as `tokens` do, of at most `limit` tokens together."""
        found: list[int] = []
        before = _NONE
        for end in range(self.block_size, limit + 1, self.block_size):
            block = self._cached.get((before, tuple(tokens[end - self.block_size : end])))
            if block is None:
                break
            found.append(block)
            before = block
        return found

    def num_evictable(self, blocks: Sequence[int]) -> int:
        """The number of these cached blocks that no table has."""
        return sum(block in self._evictable for block in blocks)

    def adopt(self, owner: Hashable, blocks: Sequence[int]) -> None:
        """Gives `owner`, which has none, the blocks that `find_cached` has found; they are no longer free."""
        if owner in self._tables:
            raise RuntimeError(f"{owner!r} has blocks already")
        for block in blocks:
            self._acquire(block)
        self._tables[owner] = BlockTable(list(blocks), self._slots_of(blocks), len(blocks))

    def cache_full_blocks(self, owner: Hashable, tokens: Sequence[int], num_computed: int) -> None:
        """Caches the full blocks of the first `num_computed` tokens, whose keys and values are written.

        A block that equals a cached one is replaced by that. No batch that reads the owner's slots may be under way.
        """
        table, size = self._tables[owner], self.block_size
        blocks, slots = table.blocks, table.slots
        replaced: list[int] = []
        while (end := (table.num_cached + 1) * size) <= num_computed:
            number = table.num_cached
            block = blocks[number]
            if slots[end - size] != block * size or slots[end - 1] != (block + 1) * size - 1:
                break  # a fork within a block: from there on positions are not those of blocks
            key = blocks[number - 1] if number else _NONE, tuple(tokens[end - size : end])
            cached = self._cached.setdefault(key, block)
            if cached == block:
                self._keys[block] = key
            else:
                blocks = blocks if replaced else list(blocks)
                blocks[number] = cached
                self._acquire(cached)
                replaced.append(block)
            table.num_cached += 1
        if replaced:
            end = table.num_cached * size
            # A new array: forks and batches may have the old one.
            table.blocks, table.slots = (
                blocks,
                np.concatenate([self._slots_of(blocks[: table.num_cached]), slots[end:]]),
            )
        for block in replaced:
            self._release(block)

    def slots(self, owner: Hashable) -> Slots:
        """int64 [at least the tokens reserved]: the slots of the owner's tokens, in order."""
        return self._tables[owner].slots

    def free(self, owner: Hashable) -> None:
        """Frees all blocks of `owner` that no other owner shares. Raises KeyError for one that has none."""
        for block in reversed(self._tables.pop(owner).blocks):
            self._release(block)

    def invalidate(self, owner: Hashable) -> None:
        """Removes the blocks of `owner` from the cache, and those that are cached after them."""
        following: defaultdict[int, list[int]] = defaultdict(list)
        for block, (before, _) in self._keys.items():
            following[before].append(block)
        to_remove = list(self._tables[owner].blocks)
        while to_remove:
            block = to_remove.pop()
            if block in self._keys:
                to_remove += following[block]
                del self._cached[self._keys.pop(block)]
                if block in self._evictable:
                    del self._evictable[block]
                    self._free.append(block)
        for table in self._tables.values():
            cached = table.blocks[: table.num_cached]
            table.num_cached = len(list(takewhile(self._keys.__contains__, cached)))

    def check_integrity(self) -> None:
        """Raises RuntimeError when a block is lost, free and owned, or miscounted, a table is inconsistent with
        its slots, or the cache is inconsistent.
        """
        counts = Counter(block for table in self._tables.values() for block in table.blocks)
        if counts != self._counts:
            raise RuntimeError(f"KV blocks are in {dict(counts)} tables, counted are {self._counts}")
        free = [*self._free, *self._evictable]
        if sorted([*counts, *free]) != list(range(1, self.num_blocks + 1)):
            raise RuntimeError(f"KV blocks lost, or free and owned: owned {sorted(counts)}, free {sorted(free)}")
        for owner, table in self._tables.items():
            parts = [list(part) for _, part in groupby(table.slots.tolist(), key=lambda slot: slot // self.block_size)]
            starts = [block * self.block_size for block in table.blocks]
            if [part[0] for part in parts] != starts or any(
                part != list(range(part[0], part[-1] + 1)) for part in parts
            ):
                raise RuntimeError(f"slots of {owner!r} are inconsistent with its blocks {table.blocks}")
        self._check_cache()

    def owners(self) -> set[Hashable]:
        """The owners of blocks, or of an empty table."""
        return set(self._tables)

    def _check_cache(self) -> None:
        if {block: key for key, block in self._cached.items()} != self._keys:
            raise RuntimeError("the cache of KV blocks and its keys are inconsistent")
        if (
            not self._keys.keys() <= self._counts.keys() | self._evictable.keys()
            or not self._evictable.keys() <= self._keys.keys()
        ):
            raise RuntimeError(
                f"KV blocks {sorted(self._keys)} are cached, evictable of them {sorted(self._evictable)}"
            )
        ages = {block: age for age, block in enumerate(self._evictable)}
        for block, (before, tokens) in self._keys.items():
            if before != _NONE and before not in self._keys:
                raise RuntimeError(f"KV block {block} is cached after {before}, which is not cached")
            if len(tokens) != self.block_size:
                raise RuntimeError(f"KV block {block} is cached under {len(tokens)} tokens")
            if before in ages and ages.get(block, self.num_blocks) > ages[before]:
                raise RuntimeError(f"KV block {before} would be evicted before {block}, which follows it")
        for owner, table in self._tables.items():
            befores = [_NONE, *table.blocks][: table.num_cached]
            if [self._keys[block][0] for block in table.blocks[: table.num_cached]] != befores:
                raise RuntimeError(f"the cached blocks of {owner!r} do not follow each other: {table.blocks}")

    def _acquire(self, block: int) -> None:
        self._evictable.pop(block, None)
        self._counts[block] = self._counts.get(block, 0) + 1

    def _release(self, block: int) -> None:
        self._counts[block] -= 1
        if self._counts[block] == 0:
            del self._counts[block]
            if block in self._keys:
                self._evictable[block] = None
            else:
                self._free.append(block)

    def _evict_oldest(self) -> int:
        block, _ = self._evictable.popitem(last=False)
        del self._cached[self._keys.pop(block)]
        return block

    def _slots_of(self, blocks: Sequence[int]) -> Slots:
        starts = np.array(blocks, dtype=np.int64)[:, None] * self.block_size
        return (starts + np.arange(self.block_size, dtype=np.int64)).reshape(-1)
