"""Which part of a parameter a rank of a tensor-parallel group has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from furiosa_build.ir.tensors import Layout


class Cut(BaseModel):
    """How a parameter is divided among ranks.

    Attributes:
        how: `rows` or `columns`: of a matrix [out, in], or a vector [out]; every rank has an equal share.
            `heads`: rows that are `heads` equal heads; where there are fewer of them than ranks, ranks share one.
            `vocabulary`: rows, if they can be shared equally, else every rank has all.
            `once`: rank 0 has it, the others have zeros: it is added to what is summed over the ranks.
        heads: How many, for `heads`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
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


@dataclass(frozen=True)
class Share:
    """The part of a parameter that a rank has.

    Attributes:
        whole: The layout of the whole parameter.
        cut: How it is divided; None: every rank has all of it.
        ranks: The size of the tensor-parallel group.
        rank: The rank in the group.
    """

    whole: Layout
    cut: Cut | None = None
    ranks: int = 1
    rank: int = 0

    @property
    def local(self) -> Layout:
        """The layout of the share."""
        if self.cut is None:
            return self.whole
        return Layout(self.whole.dtype, tuple(self.cut.local_shape(list(self.whole.shape), self.ranks)))

    @property
    def dim(self) -> int | None:
        """The dimension that is cut; None where there is none."""
        return None if self.cut is None else self.cut.dim

    @property
    def begin(self) -> int:
        """Where the share begins along `dim`."""
        return 0 if self.cut is None else self.cut.share(list(self.whole.shape), self.ranks, self.rank)[0]

    @property
    def is_zero(self) -> bool:
        """Whether another rank has the numbers, and this one zeros."""
        return self.cut is not None and self.cut.how == "once" and self.rank > 0
