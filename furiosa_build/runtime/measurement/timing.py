"""Times of what is repeated, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Self

ENOUGH = 5
"""The fewest repetitions that a median is taken of."""
STABLE = 0.02
"""A noise below which repeating more would say no more."""


@dataclass(frozen=True)
class Timing:
    """Seconds.

    Attributes:
        median: The median.
        noise: Half the distance between the quartiles, as a share of the median.
        repetitions: How many times it was done.
    """

    median: float
    noise: float
    repetitions: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        """The timing of at least one repetition."""
        middle = median(seconds)
        first, _, third = quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (middle, middle, middle)
        return cls(middle, (third - first) / 2 / middle if middle else 0.0, len(seconds))

    @property
    def is_stable(self) -> bool:
        """Whether it has been repeated often enough."""
        return self.repetitions >= ENOUGH and self.noise <= STABLE
