"""Which part of a parameter a rank of a tensor-parallel group has."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Cut(BaseModel):
    """How a parameter is divided among ranks.

    Attributes:
        how: `rows` or `columns`: of a matrix [out, in], or a vector [out]; every rank has an equal share.
            `heads`: rows that are `heads` equal heads; where there are fewer of them than ranks, ranks share one.
            `vocabulary`: rows, if they can be shared equally, else every rank has all.
            `once`: rank 0 has it, the others have zeros: it is added to what is summed over the ranks.
        heads: How many, for `heads`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    how: Literal["rows", "columns", "heads", "vocabulary", "once"]
    heads: int = 0

    @property
    def dim(self) -> int:
        """Which dimension is divided."""
        return 1 if self.how == "columns" else 0

    def fits(self, shape: list[int], size: int) -> bool:
        """Whether `size` ranks can share a parameter of this shape."""
        if self.how == "heads":
            return self.heads % size == 0 or size % self.heads == 0
        return self.how in ("vocabulary", "once") or shape[self.dim] % size == 0

    def share(self, shape: list[int], size: int, rank: int = 0) -> tuple[int, int]:
        """Where the share of `rank` begins along `dim`, and its length."""
        length = shape[self.dim]
        if self.how == "heads":
            head, first = length // self.heads, rank * self.heads // size
            return first * head, max(self.heads // size, 1) * head
        if self.how == "once" or (self.how == "vocabulary" and length % size):
            return 0, length
        return rank * (length // size), length // size

    def local_shape(self, shape: list[int], size: int) -> list[int]:
        """The shape that a rank has."""
        _, length = self.share(shape, size)
        return [length if i == self.dim else n for i, n in enumerate(shape)]
