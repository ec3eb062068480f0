"""Samples one token from one row of logits. A row is sampled alone, so batch mates cannot change it.

The order is that of transformers: bias, repetition penalty, presence and frequency penalties (as in vLLM;
transformers lacks them), tokens that are forbidden or not among those allowed, temperature, top_k, top_p, min_p. Each
filter sees what the one before it left, renormalised.

It is numpy, with every backend: so a seed gives the same tokens from the same logits. Operations go over the whole
vocabulary a few times, none slower than memory; benchmarks/sampling.py measures them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from furiosa_build.core.errors import BuildError
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.sampling.selection import (
    BLOCK,
    Floats,
    Indices,
    block_sums,
    kth_largest,
    largest,
    nucleus,
    sum_of,
)

Tokens = Sequence[int] | NDArray[np.int64]

_LARGEST = np.float32(1e30)
"""The largest penalty and penalized logit: far beyond any that matters, and nothing later overflows."""


@dataclass(frozen=True)
class Proposal:
    """A token, and the probabilities [vocab] that it was drawn with; None for a greedy choice."""

    token: int
    probabilities: Floats | None


class Random:
    """Random numbers in [0, 1) from a seed: those of torch.Generator, without torch."""

    def __init__(self, seed: int) -> None:
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)  # the Mersenne Twister, which takes 32 bits of a seed

    def next(self) -> float:
        upper, lower = np.frombuffer(self._words.bytes(8), dtype="<u4").tolist()
        return float((upper << 32 | lower) & ((1 << 53) - 1)) * 2.0**-53


def propose(
    logits: Floats,
    params: SamplingParams,
    *,
    prompt: Tokens,
    output: Tokens,
    forbidden: Collection[int] = (),
    generator: Random | None = None,
) -> Proposal:
    """Chooses a token as `sample` does, and keeps what it was drawn from."""
    logits = _permitted(penalize(logits, params, prompt, output), params, forbidden)
    if params.greedy:
        return Proposal(_largest_logit(logits)[0], None)
    probabilities = distribution(logits, params)
    return Proposal(_draw(probabilities, generator), probabilities)


def sample(
    logits: Floats,
    params: SamplingParams,
    *,
    prompt: Tokens,
    output: Tokens,
    forbidden: Collection[int] = (),
    allowed: NDArray[np.bool_] | None = None,
    generator: Random | None = None,
    proposal: Proposal | None = None,
) -> int:
    """Chooses the next token.

    With a proposal by rejection sampling (Leviathan et al., "Fast Inference from Transformers via Speculative
    Decoding", 2023, algorithm 1): whatever it was drawn from, the token that is returned is distributed as without it.

    Args:
        logits: float32 [vocab]; not changed.
        params: How to choose.
        prompt: Token ids of the prompt.
        output: Token ids generated so far.
        forbidden: Token ids that must not be chosen.
        allowed: bool [vocab]: the only tokens that may be chosen; None: all.
        generator: Source of randomness, advanced by exactly one number, by two when a proposal is rejected; not used
            when greedy.
        proposal: The token that is likely to be chosen.

    Returns:
        The token id. Greedy takes the lowest of several that are equally likely.

    Raises:
        BuildError: The logits have a NaN, or nothing is left to choose from.
    """
    logits = _permitted(penalize(logits, params, prompt, output), params, forbidden, allowed)
    if params.greedy:
        return _largest_logit(logits)[0]
    if proposal is None or proposal.probabilities is None:
        ids, weights = _candidates(logits, params)
        place = _draw(weights, generator)
        return place if ids is None else int(ids[place])
    probabilities = distribution(logits, params)
    token = proposal.token
    if _random(generator) * float(proposal.probabilities[token]) < probabilities[token]:
        return token
    left = np.maximum(probabilities - proposal.probabilities, 0)
    # Both sum to 1, so something is left, but for rounding.
    return _draw(left if left.any() else probabilities, generator)


def penalize(logits: Floats, params: SamplingParams, prompt: Tokens, output: Tokens) -> Floats:
    """Logits after bias and penalties; a new array if any applies, else the same one. Shapes as in `sample`."""
    repeats = params.repetition_penalty != 1
    counts = (params.presence_penalty or params.frequency_penalty) and len(output)
    if not (params.logit_bias or repeats or counts):
        return logits
    logits = logits.copy()
    if params.logit_bias:
        logits[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), dtype=np.float32)
    if repeats:
        seen = np.concatenate([np.asarray(prompt, dtype=np.int64), np.asarray(output, dtype=np.int64)])
        values = logits[seen]
        penalty = np.float32(np.clip(params.repetition_penalty, 1 / _LARGEST, _LARGEST))
        logits[seen] = np.minimum(np.where(values < 0, values * penalty, values / penalty), _LARGEST)
    if counts:
        generated, numbers = np.unique(np.asarray(output), return_counts=True)
        logits[generated] -= (params.presence_penalty + params.frequency_penalty * numbers).astype(np.float32)
    return logits


def _permitted(
    logits: Floats, params: SamplingParams, forbidden: Collection[int], allowed: NDArray[np.bool_] | None = None
) -> Floats:
    """Logits with -inf for tokens that may not be chosen; the same array if all may."""
    if allowed is not None:
        # The smaller of each logit and plus or minus infinity: np.where takes long where the two alternate.
        bounds = allowed - np.float32(0.5)
        np.copysign(np.float32(np.inf), bounds, out=bounds)
        logits = np.minimum(logits, bounds, out=bounds)
    if params.allowed_token_ids is not None:
        listed = list(params.allowed_token_ids)
        others = np.full_like(logits, -np.inf)
        others[listed] = logits[listed]
        logits = others
    if forbidden:
        logits = logits.copy()
        logits[list(forbidden)] = -np.inf
    return logits


def distribution(logits: Floats, params: SamplingParams) -> Floats:
    """The probabilities [vocab] to draw with, after temperature and filters."""
    ids, weights = _candidates(logits, params)
    weights /= np.float32(sum_of(weights))
    if ids is None:
        return weights
    probabilities = np.zeros_like(logits)
    probabilities[ids] = weights
    return probabilities


def _candidates(logits: Floats, params: SamplingParams) -> tuple[Indices | None, Floats]:
    """The tokens to draw from, ascending (None: all), and the weights to draw them with: of the likeliest it is 1."""
    _, best = _largest_logit(logits)
    ids = None
    if 0 < params.top_k < len(logits):  # with all that equal the k-th
        ids = np.flatnonzero(logits >= kth_largest(logits, params.top_k))
        logits = logits[ids]
    with np.errstate(over="ignore"):  # what is too far below the likeliest has the weight 0
        weights = logits - best
        if params.temperature != 1:
            weights /= np.float32(params.temperature)
    np.exp(weights, out=weights)
    if params.top_p < 1:
        kept, weights = nucleus(weights, params.top_p)
        if kept is not None:
            ids = kept if ids is None else ids[kept]
    if params.min_p > 0:
        weights *= weights >= np.float32(params.min_p)
    return ids, weights


def _draw(weights: Floats, generator: Random | None) -> int:
    """An index drawn by inverting the cumulative distribution: one random number, however many candidates.

    The sums of blocks say in which block, so that few numbers are added one after the other.
    """
    ends = np.cumsum(block_sums(weights), dtype=np.float64)
    point = _random(generator) * ends[-1]
    block = _place(ends, point)
    begin = block * BLOCK
    inside = np.cumsum(weights[begin : begin + BLOCK], dtype=np.float64)
    return begin + _place(inside, point - (ends[block - 1] if block else 0.0))


def _place(cumulative: NDArray[np.float64], point: float) -> int:
    """The first index beyond the point. It may be rounded up to the total, and what is last may weigh nothing."""
    last = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
    return min(int(np.searchsorted(cumulative, point, side="right")), last)


def _random(generator: Random | None) -> float:
    """A random number in [0, 1)."""
    assert generator is not None, "a choice that is not greedy needs random numbers"
    return generator.next()


def top_logprobs(logits: Floats, token: int, number: int) -> list[tuple[int, float, int]]:
    """Log probabilities of `token` first, then of the `number` likeliest: (token id, log probability, rank).

    `logits` is float32 [vocab]; rank 1 is the likeliest. A token among the likeliest comes once only.

    Raises:
        BuildError: The logits have a NaN, or none is finite.
    """
    _, best = _largest_logit(logits)
    with np.errstate(over="ignore"):
        shifted = logits - best
    total = np.log(sum_of(np.exp(shifted)))
    rank = int(np.count_nonzero(logits > logits[token])) + 1
    likeliest = largest(logits, number).tolist()
    others = [(id_, float(shifted[id_] - total), place) for place, id_ in enumerate(likeliest, start=1) if id_ != token]
    return [(token, float(shifted[token] - total), rank), *others]


def _largest_logit(logits: Floats) -> tuple[int, np.float32]:
    """The token of the largest logit, and that. Raises BuildError where it says nothing."""
    best = int(logits.argmax())  # takes NaN for the largest
    if not np.isfinite(logits[best]):
        raise BuildError(f"the model's logits have no usable maximum: {logits[best]} at token {best}")
    return best, logits[best]
