"""The largest of many numbers, without sorting them all: of a vocabulary, sorting takes milliseconds.

Masks that hold for about half of the numbers are slow to index by, and are multiplied by instead.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]

BLOCK = 512
"""Weights that are summed together, of many that are summed or drawn from."""
_ROWS = 64
"""Numbers of which one is looked at to find a bound: of 128k, some two thousand."""
_FEW = 2048
"""So many are sorted."""
_SAMPLE = 1024
_HEAVY = 16
"""The numbers that this many of the sample exceed may weigh anything; the others are as the sample says, roughly."""
_MARGIN = 48
"""So many places in the sample are three standard deviations of its sums."""


def kth_largest(values: Floats, k: int) -> np.float32:
    """What is k-th when the values, at least k and no NaN among them, are in descending order."""
    return np.float32(np.partition(values[_not_below_k(values, k)], -k)[-k])


def _not_below_k(values: Floats, k: int) -> Indices:
    """Indices, ascending, of the k largest and some more.

    The values are laid out in columns: k of these have a largest that is not below some bound, and so have k values.
    """
    rows = min(_ROWS, len(values) // (2 * k))
    if rows < 2:
        return np.arange(len(values))
    columns = len(values) // rows
    of_columns = values[: rows * columns].reshape(rows, columns).max(axis=0)
    return np.flatnonzero(values >= np.partition(of_columns, -k)[-k])


def largest(values: Floats, number: int) -> Indices:
    """Indices of the `number` largest, or of all, the largest first; of equal ones the first."""
    number = min(number, len(values))
    if number == 0:
        return np.empty(0, dtype=np.intp)
    candidates = np.flatnonzero(values >= kth_largest(values, number))
    return candidates[np.argsort(-values[candidates], kind="stable")][:number]


def nucleus(weights: Floats, share: float) -> tuple[Indices | None, Floats]:
    """The largest weights, up to the one that makes their sum reach this share of all; of equal ones the first.

    Weights are not negative, and the share is less than 1.

    Returns:
        The indices of some of the weights, ascending, and these weights; None and all, if they are many. What is not
        kept is 0.
    """
    total = sum_of(weights)
    candidates = _not_below_k(weights, min(_FEW // 2, len(weights)))
    among = weights[candidates]
    few = sum_of(among) >= share * total
    among = among if few else weights
    last, surplus = _last(among, share * total, sum_of(among) if few else total)
    kept = among * (among >= last)
    if surplus:
        kept[np.flatnonzero(among == last)[-surplus:]] = 0
    return (candidates, kept) if few else (None, kept)


def sum_of(weights: Floats) -> float:
    """Their sum, rounded to float32 within blocks only."""
    return float(block_sums(weights).sum(dtype=np.float64))


def block_sums(weights: Floats) -> Floats:
    """The sum of each BLOCK of weights, one after the other."""
    sums: Floats = np.add.reduceat(weights, np.arange(0, len(weights), BLOCK))
    return sums


def _last(weights: Floats, wanted: float, total: float) -> tuple[np.float32, int]:
    """The weight that in descending order makes the sum reach `wanted`, and how many that equal it come after it."""
    while len(weights) > _FEW:
        fewer, below, sum_of_fewer = _narrow(weights, wanted, total)
        if len(fewer) == len(weights):  # most are equal
            break
        weights, wanted, total = fewer, wanted - below, sum_of_fewer
    ordered = -np.sort(-weights)
    number = min(int(np.searchsorted(np.cumsum(ordered, dtype=np.float64), wanted)) + 1, len(ordered))
    last = ordered[number - 1]
    return last, int(np.count_nonzero(ordered[number:] == last))


def _narrow(weights: Floats, wanted: float, total: float) -> tuple[Floats, float, float]:
    """Those weights of which one, in descending order, makes the sum reach `wanted`.

    Where they are is guessed from a sample, and then looked up: the guess decides only how few they are.

    Returns:
        The weights, the sum of all that are larger, and their own.
    """
    sample = -np.sort(-weights[:: len(weights) // _SAMPLE])
    heavy = weights[np.flatnonzero(weights > sample[_HEAVY])]
    if (sum_of_heavy := sum_of(heavy) if len(heavy) else 0.0) >= wanted:
        return heavy, 0.0, sum_of_heavy
    sums = np.cumsum(sample[_HEAVY:], dtype=np.float64)
    place = _HEAVY + int(np.searchsorted(sums, sums[-1] * (wanted - sum_of_heavy) / (total - sum_of_heavy)))
    high, low = sample[max(place - _MARGIN, _HEAVY)], sample[min(place + _MARGIN, len(sample) - 1)]
    larger = sum_of(weights * (weights > high))
    if larger >= wanted:
        return weights[np.flatnonzero(weights > high)], 0.0, larger
    middle = weights[np.flatnonzero((weights <= high) & (weights >= low))]
    sum_of_middle = sum_of(middle)
    smaller = weights[np.flatnonzero(weights < low)] if larger + sum_of_middle < wanted else middle[:0]
    if len(smaller):
        return smaller, larger + sum_of_middle, total - larger - sum_of_middle
    return middle, larger, sum_of_middle
