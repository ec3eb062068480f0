"""Beam search: which continuations of a prompt are followed, and when it is over. Numbers only: no model, no KV cache.

The search is that of transformers (`GenerationMixin._beam_search`), step by step and in float32: of all continuations
by one token, twice as many as beams are looked at (more if there are several end tokens), so that enough go on when
the best of them end; only the best `width` of these may end. Ended beams are ranked by

    sum of log probabilities / number of tokens ** length_penalty
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from furiosa_build.core.errors import BuildError
from furiosa_build.runtime.sampling.selection import Floats, largest

EarlyStopping = bool | Literal["never"]

_NEVER = np.float32(-1e9)
"""The score of a beam that does not exist."""


@dataclass(frozen=True)
class Continuation:
    """A beam that goes on: which of the beams before it continues (its index), and by which token."""

    parent: int
    token: int


@dataclass(frozen=True)
class FinishedBeam:
    """A completion: its tokens, the sum of their log probabilities, and what it is ranked by."""

    tokens: list[int]
    cumulative_logprob: float
    score: float


class BeamSearch:
    """The state of one beam search.

    Args:
        width: Beams that are followed at a time.
        max_tokens: Where a beam ends if it meets no end token; >= 1.
        end_tokens: Tokens that end a beam.
        length_penalty: Above 0 favours long completions, below 0 short ones.
        early_stopping: When `width` beams have ended, the search is over: True: at once. False: when the best that goes
            on is worse than all of them at its present length. `never`: when it cannot become better at any length.

    Attributes:
        width: The argument.
        max_tokens: The argument.
        finished: The best beams that have ended, the best first; at most `width`.
        is_done: Whether the search is over; then there are `width` of them.
    """

    def __init__(
        self,
        width: int,
        max_tokens: int,
        end_tokens: Collection[int] = (),
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
    ) -> None:
        self.finished: list[FinishedBeam] = []
        self.is_done = False
        self.width, self.max_tokens = width, max_tokens
        self._end_tokens = frozenset(end_tokens)
        self._length_penalty, self._early_stopping = length_penalty, early_stopping
        self._tokens: list[list[int]] = [[] for _ in range(width)]
        # All start from the same prompt: only one of them may be continued, or all would be the same.
        self._scores: Floats = np.full(width, _NEVER, dtype=np.float32)
        self._scores[0] = 0

    def step(self, logits: Floats) -> list[Continuation]:
        """Takes the model's logits and continues the beams.

        Args:
            logits: float32 [width, vocab], a row for each beam in the order of the last step's continuations; or [1,
                vocab], those of the prompt.

        Returns:
            The `width` beams that go on, the best first. Without meaning when the search `is_done`.

        Raises:
            BuildError: The logits of a beam have a NaN, or nothing is left to choose from.
        """
        if not np.isfinite(logits.max(axis=-1)).all():  # which takes NaN for the largest
            raise BuildError(f"the model's logits have no usable maximum: {logits.max(axis=-1)}")
        totals = _log_softmax(np.broadcast_to(logits, (self.width, logits.shape[1]))) + self._scores[:, None]
        candidates = largest(totals.reshape(-1), max(2, 1 + len(self._end_tokens)) * self.width)
        parents, tokens = (candidates // totals.shape[1]).tolist(), (candidates % totals.shape[1]).tolist()
        scores = totals.reshape(-1)[candidates]
        length = len(self._tokens[0]) + 1
        ends = [token in self._end_tokens or length == self.max_tokens for token in tokens]
        for parent, token, score, end in list(zip(parents, tokens, scores, ends, strict=True))[: self.width]:
            if end:
                self._finish([*self._tokens[parent], token], score, length)
        going_on = largest(scores + np.where(ends, _NEVER, np.float32(0)), self.width).tolist()
        self._tokens = [[*self._tokens[parents[i]], tokens[i]] for i in going_on]
        self._scores = scores[going_on]
        self.is_done = all(ends) or self._cannot_improve(length)
        return [Continuation(parents[i], tokens[i]) for i in going_on]

    def _finish(self, tokens: list[int], total: np.float32, length: int) -> None:
        score = float(total / np.float32(length**self._length_penalty))
        self.finished.append(FinishedBeam(tokens, float(total), score))
        self.finished.sort(key=lambda beam: -beam.score)
        del self.finished[self.width :]

    def _cannot_improve(self, length: int) -> bool:
        if len(self.finished) < self.width:
            return False
        if self._early_stopping is True:
            return True
        if self._early_stopping == "never" and self._length_penalty > 0:
            length = self.max_tokens
        best = float(self._scores[0] / np.float32(length**self._length_penalty))
        return best <= self.finished[-1].score


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logprobs: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logprobs
