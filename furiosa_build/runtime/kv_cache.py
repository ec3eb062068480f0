"""Who has which KV block. A slot holds one token's keys and values: slot = block * block_size + offset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


@dataclass
class BlockTable:
    """The blocks of one sequence in order, and the same spelled out as slots: token i lives in slots[i].

    Of a block that was not this table's own at first it may have only the first slots.
    """

    blocks: list[int] = field(default_factory=list)
    slots: Slots = field(default_factory=lambda: np.empty(0, dtype=np.int64))


class BlockManager:
    """Hands out KV blocks 1 to num_blocks to sequences. Sequences with equal beginnings may share the blocks of these.

    Whoever owns blocks is named by any hashable value. Block 0 is scratch: padding writes there. So the caches need
    (num_blocks + 1) * block_size slots.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last, likely still in the processor's cache, is reused first.
        self._free = list(range(num_blocks, 0, -1))
        self._tables: dict[Hashable, BlockTable] = {}
        # How many tables have a block; those that are free are not in it.
        self._counts: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def missing(self, owner: Hashable, num_tokens: int) -> int:
        """How many free blocks `reserve` would take."""
        table = self._tables.get(owner)
        return self.blocks_for(max(0, num_tokens - (len(table.slots) if table else 0)))

    def reserve(self, owner: Hashable, num_tokens: int) -> None:
        """Gives `owner` slots for its first `num_tokens` tokens, those that it has already included.

        Raises:
            RuntimeError: Too few free blocks; nothing has changed. Ask `missing` first.
        """
        missing = self.missing(owner, num_tokens)
        if missing > self.num_free:
            raise RuntimeError(f"{missing} blocks wanted, {self.num_free} free")
        table = self._tables.setdefault(owner, BlockTable())
        if missing > 0:
            new = [self._free.pop() for _ in range(missing)]
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
        self._tables[target] = BlockTable(blocks, slots)

    def slots(self, owner: Hashable) -> Slots:
        """int64 [at least the tokens reserved]: the slots of the owner's tokens, in order."""
        return self._tables[owner].slots

    def free(self, owner: Hashable) -> None:
        """Takes all blocks of `owner` back that nobody else has. Raises KeyError for one that has none."""
        for block in reversed(self._tables.pop(owner).blocks):
            self._counts[block] -= 1
            if self._counts[block] == 0:
                del self._counts[block]
                self._free.append(block)

    def check_integrity(self) -> None:
        """Raises RuntimeError when a block is lost, free and owned, miscounted, or a table disagrees with its slots."""
        counts = Counter(block for table in self._tables.values() for block in table.blocks)
        if counts != self._counts:
            raise RuntimeError(f"KV blocks are in {dict(counts)} tables, counted are {self._counts}")
        if sorted([*counts, *self._free]) != list(range(1, self.num_blocks + 1)):
            raise RuntimeError(f"KV blocks lost, or free and owned: owned {sorted(counts)}, free {sorted(self._free)}")
        for owner, table in self._tables.items():
            parts = [list(part) for _, part in groupby(table.slots.tolist(), key=lambda slot: slot // self.block_size)]
            starts = [block * self.block_size for block in table.blocks]
            if [part[0] for part in parts] != starts or any(
                part != list(range(part[0], part[-1] + 1)) for part in parts
            ):
                raise RuntimeError(f"slots of {owner!r} disagree with its blocks {table.blocks}")

    def owners(self) -> set[Hashable]:
        """Who has blocks (or an empty table)."""
        return set(self._tables)

    def _slots_of(self, blocks: list[int]) -> Slots:
        starts = np.array(blocks, dtype=np.int64)[:, None] * self.block_size
        return (starts + np.arange(self.block_size, dtype=np.int64)).reshape(-1)
