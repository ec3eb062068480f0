"""Samples one token from one row of logits. A row is sampled alone, so batch mates cannot change it.

The order is that of transformers: bias, repetition penalty, presence and frequency penalties (as in vLLM;
transformers lacks them), tokens that are forbidden or not among those allowed, temperature, top_k, top_p, min_p. Each
filter sees what the one before it left, renormalised.

It is numpy: the arrays are small, and threads woken for each operation would cost more than the operation.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from furiosa_build.core.errors import BuildError
from furiosa_build.runtime.sampling.params import SamplingParams

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]

_GROUP = 64
"""Logits of which one is looked at to find a bound: of 128k, some two thousand."""
_LARGEST = np.float32(1e30)
"""The largest penalty and penalized logit: far beyond any that matters, and nothing later overflows."""


@dataclass(frozen=True)
class Proposal:
    """A token, and what it was drawn from: token ids [n], ascending, and their probabilities, float32 [n]."""

    token: int
    ids: Indices
    probabilities: Floats


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
    prompt: Sequence[int],
    output: Sequence[int],
    forbidden: Collection[int] = (),
    generator: Random | None = None,
) -> Proposal:
    """Chooses a token as `sample` does, and keeps what it was drawn from. A greedy one has the probability 1."""
    ids, probabilities = _candidates(logits, params, prompt, output, forbidden)
    index = 0 if params.greedy else _draw(probabilities, generator)
    return Proposal(int(ids[index]), ids, probabilities)


def sample(
    logits: Floats,
    params: SamplingParams,
    *,
    prompt: Sequence[int],
    output: Sequence[int],
    forbidden: Collection[int] = (),
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
        generator: Source of randomness, advanced by exactly one number, by two when a proposal is rejected; not used
            when greedy.
        proposal: The token that is likely to be chosen.

    Returns:
        The token id. Greedy takes the lowest of several that are equally likely.

    Raises:
        BuildError: The logits have a NaN, or nothing is left to choose from.
    """
    ids, probabilities = _candidates(logits, params, prompt, output, forbidden)
    if params.greedy:
        return int(ids[0])
    if proposal is not None:
        token, proposed = proposal.token, (proposal.ids, proposal.probabilities)
        if _random(generator) * _at(token, *proposed) < _at(token, ids, probabilities):
            return token
        left = np.maximum(probabilities - _at(ids, *proposed), 0)
        # Both sum to 1, so something is left, but for rounding.
        probabilities = left if left.any() else probabilities
    return int(ids[_draw(probabilities, generator)])


def _candidates(
    logits: Floats,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    forbidden: Collection[int],
) -> tuple[Indices, Floats]:
    """The tokens to choose from: ids [n], ascending, and probabilities, float32 [n]; of a greedy choice one."""
    logits = penalize(logits, params, prompt, output)
    if params.allowed_token_ids is not None:
        allowed = list(params.allowed_token_ids)
        others = np.full_like(logits, -np.inf)
        others[allowed] = logits[allowed]
        logits = others
    if forbidden:
        logits = logits.copy()
        logits[list(forbidden)] = -np.inf
    best, _ = _largest_logit(logits)
    return (np.array([best]), np.ones(1, dtype=np.float32)) if params.greedy else distribution(logits, params)


def _largest_logit(logits: Floats) -> tuple[int, np.float32]:
    """The token of the largest logit, and that. Raises BuildError where it says nothing."""
    best = int(logits.argmax())  # takes NaN for the largest
    if not np.isfinite(logits[best]):
        raise BuildError(f"the model's logits have no usable maximum: {logits[best]} at token {best}")
    return best, logits[best]


def _at(tokens: int | Indices, ids: Indices, probabilities: Floats) -> Floats:
    """The probabilities of `tokens`; 0 for those that are not among `ids`."""
    indices = np.minimum(np.searchsorted(ids, tokens), len(ids) - 1)
    found: Floats = np.where(ids[indices] == tokens, probabilities[indices], np.float32(0))
    return found


def penalize(logits: Floats, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]) -> Floats:
    """Logits after bias and penalties; a new array if any applies, else the same one. Shapes as in `sample`."""
    if params.logit_bias:
        logits = logits.copy()
        logits[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), dtype=np.float32)
    if params.repetition_penalty != 1:
        logits = logits.copy()
        seen = list({*prompt, *output})
        values = logits[seen]
        penalty = np.float32(np.clip(params.repetition_penalty, 1 / _LARGEST, _LARGEST))
        logits[seen] = np.minimum(np.where(values < 0, values * penalty, values / penalty), _LARGEST)
    if (params.presence_penalty or params.frequency_penalty) and output:
        logits = logits.copy()
        generated, counts = np.unique(np.array(output), return_counts=True)
        logits[generated] -= (params.presence_penalty + params.frequency_penalty * counts).astype(np.float32)
    return logits


def distribution(logits: Floats, params: SamplingParams) -> tuple[Indices, Floats]:
    """The distribution to draw from, after temperature and filters.

    Returns:
        Token ids [n], ascending, and their probabilities, float32 [n], which sum to 1.
    """
    logits = logits / np.float32(params.temperature)
    bound = _below_top(logits, params.top_k)
    ids = np.flatnonzero(logits > -np.inf if bound == -np.inf else logits >= bound)
    logits = logits[ids]
    for keep in (_top_k, _top_p, _min_p):
        kept = keep(logits, params)
        if kept is not None:
            ids, logits = ids[kept], logits[kept]
    return ids, _softmax(logits)


def top_logprobs(logits: Floats, token: int, number: int) -> list[tuple[int, float, int]]:
    """Log probabilities of `token` first, then of the `number` likeliest: (token id, log probability, rank).

    `logits` is float32 [vocab]; rank 1 is the likeliest. A token among the likeliest comes once only.

    Raises:
        BuildError: The logits have a NaN, or none is finite.
    """
    shifted = logits - _largest_logit(logits)[1]
    logprobs = shifted - np.log(np.exp(shifted).sum())
    rank = int((logprobs > logprobs[token]).sum()) + 1
    likeliest = enumerate(_largest(logprobs, number).tolist(), start=1)
    others = [(id_, float(logprobs[id_]), rank) for rank, id_ in likeliest if id_ != token]
    return [(token, float(logprobs[token]), rank), *others]


def _largest(values: Floats, number: int) -> Indices:
    """Indices of the `number` largest, the largest first; of equal ones the first."""
    if number == 0:
        return np.empty(0, dtype=np.intp)
    number = min(number, len(values))
    candidates = np.flatnonzero(values >= np.partition(values, -number)[-number])
    return candidates[np.argsort(-values[candidates], kind="stable")][:number]


def _below_top(logits: Floats, number: int) -> np.float32:
    """Something that the `number` largest are not below, found without looking for them; -inf if that takes too long.

    So many groups have a largest that is not below it, and those are as many logits.
    """
    groups = len(logits) // _GROUP
    if not 0 < number <= groups:
        return np.float32(-np.inf)
    largest = logits[: groups * _GROUP].reshape(groups, _GROUP).max(axis=1)
    return np.float32(np.partition(largest, -number)[-number])


# The filters: indices into `logits` of what is kept, ascending; None keeps everything.


def _top_k(logits: Floats, params: SamplingParams) -> Indices | None:
    """The k largest, and all that equal the k-th."""
    if not 0 < params.top_k < len(logits):
        return None
    return np.flatnonzero(logits >= np.partition(logits, -params.top_k)[-params.top_k])


def _top_p(logits: Floats, params: SamplingParams) -> Indices | None:
    """The likeliest, up to the one whose probability makes their sum reach top_p."""
    if params.top_p >= 1:
        return None
    probabilities = _softmax(logits)
    # All tokens under this bound together weigh less than what may be dropped, so they need not be sorted
    # (sorting a vocabulary of 128k takes milliseconds). The factor allows for rounding.
    bound = 0.99 * (1 - params.top_p) / len(logits)
    candidates = np.flatnonzero(probabilities >= bound)
    ranked = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    weights = probabilities[ranked].astype(np.float64)
    before = np.cumsum(weights) - weights
    return np.sort(ranked[before < params.top_p])


def _min_p(logits: Floats, params: SamplingParams) -> Indices | None:
    """The tokens at least min_p times as likely as the likeliest."""
    if params.min_p <= 0:
        return None
    probabilities = _softmax(logits)
    return np.flatnonzero(probabilities >= np.float32(params.min_p) * probabilities.max())


def _softmax(logits: Floats) -> Floats:
    weights: Floats = np.exp(logits - logits.max())
    weights /= weights.sum()
    return weights


def _draw(probabilities: Floats, generator: Random | None) -> int:
    """An index drawn by inverting the cumulative distribution: one random number, however many candidates."""
    cumulative = np.cumsum(probabilities, dtype=np.float64)
    point = _random(generator) * cumulative[-1]
    # The product may round up to the total, and what is last may have no probability.
    last = int(np.searchsorted(cumulative, cumulative[-1], side="left"))
    return min(int(np.searchsorted(cumulative, point, side="right")), last)


def _random(generator: Random | None) -> float:
    """A random number in [0, 1)."""
    assert generator is not None, "a choice that is not greedy needs random numbers"
    return generator.next()
