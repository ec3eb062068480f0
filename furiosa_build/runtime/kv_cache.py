"""Who owns which KV block. A slot holds one token's keys and values: slot = block * block_size + offset."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


@dataclass
class BlockTable:
    """The blocks of one sequence in order, and the same spelled out as slots: token i lives in slots[i]."""

    blocks: list[int] = field(default_factory=list)
    slots: Slots = field(default_factory=lambda: np.empty(0, dtype=np.int64))


class BlockManager:
    """Hands out KV blocks 1 to num_blocks to sequences, each to one at a time.

    Block 0 is scratch: padding writes there. So the caches need (num_blocks + 1) * block_size slots.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        # A stack: the block freed last, likely still in the processor's cache, is reused first.
        self._free = list(range(num_blocks, 0, -1))
        self._tables: dict[str, BlockTable] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def can_reserve(self, owner: str, num_tokens: int) -> bool:
        """Whether `reserve` would succeed."""
        return self._missing(owner, num_tokens) <= self.num_free

    def reserve(self, owner: str, num_tokens: int) -> None:
        """Gives `owner` slots for its first `num_tokens` tokens, those that it has already included.

        Raises:
            RuntimeError: Too few free blocks; nothing has changed. Ask `can_reserve` first.
        """
        missing = self._missing(owner, num_tokens)
        if missing > self.num_free:
            raise RuntimeError(f"{missing} blocks wanted, {self.num_free} free")
        table = self._tables.setdefault(owner, BlockTable())
        if missing > 0:
            new = [self._free.pop() for _ in range(missing)]
            table.blocks += new
            table.slots = np.concatenate([table.slots, self._slots_of(new)])

    def slots(self, owner: str) -> Slots:
        """int64 [tokens reserved, rounded up to whole blocks]: the slots of the owner's tokens, in order."""
        return self._tables[owner].slots

    def free(self, owner: str) -> None:
        """Takes all blocks of `owner` back. Raises KeyError for one that has none."""
        self._free += reversed(self._tables.pop(owner).blocks)

    def check_integrity(self) -> None:
        """Raises RuntimeError when a block is lost, owned twice, or a table disagrees with its slots."""
        owned = [block for table in self._tables.values() for block in table.blocks]
        if sorted(owned + self._free) != list(range(1, self.num_blocks + 1)):
            raise RuntimeError(f"KV blocks lost or owned twice: owned {sorted(owned)}, free {sorted(self._free)}")
        for owner, table in self._tables.items():
            if not np.array_equal(table.slots, self._slots_of(table.blocks)):
                raise RuntimeError(f"slots of {owner!r} disagree with its blocks {table.blocks}")

    def owners(self) -> set[str]:
        """Who has blocks (or an empty table)."""
        return set(self._tables)

    def _missing(self, owner: str, num_tokens: int) -> int:
        table = self._tables.get(owner)
        return max(0, self.blocks_for(num_tokens) - (len(table.blocks) if table else 0))

    def _slots_of(self, blocks: list[int]) -> Slots:
        starts = np.array(blocks, dtype=np.int64)[:, None] * self.block_size
        return (starts + np.arange(self.block_size, dtype=np.int64)).reshape(-1)
