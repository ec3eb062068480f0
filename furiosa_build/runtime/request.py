"""A request on its way through an engine, and what its caller is given."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from furiosa_build.runtime.sampling.params import SamplingParams

if TYPE_CHECKING:
    from furiosa_build.runtime.pooling import PoolingParams
    from furiosa_build.runtime.sampling.beam_search import BeamSearch
    from furiosa_build.runtime.sampling.guided import Guide
    from furiosa_build.runtime.sampling.sampler import Proposal, Random
    from furiosa_build.runtime.text.detokenizer import OutputText

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Logprob:
    """Log probability of a token, its rank (1 is the likeliest) and its text (None without a tokenizer)."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True)
class CompletionOutput:
    """A completion so far.

    Attributes:
        index: 0, 1, ... of the completions of a prompt.
        text: The text so far; later outputs of the request only append to it. Empty without a tokenizer.
        token_ids: All tokens generated so far, the one that ended the text included.
        cumulative_logprob: Sum of the tokens' log probabilities; None unless `logprobs` was asked for, or beam search.
        logprobs: Per token, token id -> Logprob; None unless asked for.
        finish_reason: `stop` or `length`; None while unfinished.
        stop_reason: The stop string or stop token that ended it; None for end of sequence and for length. Of guided
            output that reached a dead end of its grammar (`length`): what is wrong.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None


@dataclass(frozen=True)
class RequestOutput:
    """The state of a request after a step. `prompt` is None for prompts given as token ids.

    `prompt_logprobs` has one entry per prompt token (None for the first, which nothing predicts), if asked
    for. `num_cached_tokens` is how many of the prompt's tokens were not computed, as they were in the KV cache already.
    `queued_s` is the time in seconds from its arrival to its first step. `embedding` is that of the prompt, for a
    request with PoolingParams; it has no tokens then.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    num_cached_tokens: int = field(default=0, compare=False)
    queued_s: float = field(default=0.0, compare=False)
    embedding: list[float] | None = None


@dataclass(eq=False)
class TokenSequence:
    """Prompt and generated tokens, one after the other. KV blocks belong to the sequence, not to its tokens."""

    tokens: list[int]


@dataclass(eq=False)
class Request:
    """A request under way: one sequence of tokens, or those of a beam search, which are of equal length.

    Attributes:
        arrival: Rank in the order of arrival; the larger, the younger.
        beams: The state of a beam search; None for other requests.
        sequences: One sequence; after the first step of a beam search as many as there are beams.
        num_computed: How many tokens of every sequence, from the first, have their keys and values in the KV cache.
        num_cached_tokens: How many were there when it was first admitted; None before that.
        completions: The completions of a beam search that is over.
        arrived_at: Seconds of the monotonic clock.
        started_at: When its first step was submitted, likewise; None before that.
        generator: Source of this request's random numbers; None for a greedy one.
        end_token_ids: Tokens that end the text: end of sequence unless ignored, and stop_token_ids.
        guide: Says which tokens may come next; None for all.
        bad_words: The tokens of each text that the output may not contain.
        pooling: Asks for an embedding of the prompt, which is `embedding` at the end, and for no tokens.
        proposals: The next tokens that a draft model proposes, in the step that is under way.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    text: OutputText
    arrival: int = 0
    generator: Random | None = None
    end_token_ids: frozenset[int] = frozenset()
    beams: BeamSearch | None = None
    guide: Guide | None = None
    bad_words: Sequence[Sequence[int]] = ()
    pooling: PoolingParams | None = None
    embedding: list[float] | None = None
    sequences: list[TokenSequence] = field(init=False)
    num_computed: int = 0
    num_cached_tokens: int | None = None
    proposals: list[Proposal] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    completions: list[CompletionOutput] = field(default_factory=list)
    arrived_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None

    def __post_init__(self) -> None:
        self.sequences = [TokenSequence(list(self.prompt_token_ids))]

    @property
    def width(self) -> int:
        """The number of rows that it takes in a decode batch."""
        return 1 if self.beams is None else self.beams.width

    @property
    def tokens(self) -> list[int]:
        """The tokens of the first sequence, which for all but beam searches is the only one."""
        return self.sequences[0].tokens

    def next_tokens(self, start: int, count: int) -> list[int]:
        """`count` of its tokens from `start` on, followed by what is proposed."""
        beyond = max(0, start - len(self.tokens))
        known = self.tokens[start : start + count]
        return known + [each.token for each in self.proposals[beyond : beyond + count - len(known)]]

    def forbidden_tokens(self, proposed: int = 0) -> frozenset[int]:
        """The tokens that may not be chosen after so many proposals: they end it before `min_tokens`, or a bad word."""
        ends = self.end_token_ids if self.num_generated + proposed < self.params.min_tokens else frozenset()
        if not self.bad_words:
            return ends
        output = [*self.output_token_ids, *(each.token for each in self.proposals[:proposed])]
        return ends | {word[-1] for word in self.bad_words if output[len(output) - len(word) + 1 :] == list(word[:-1])}

    @property
    def is_prompt_computed(self) -> bool:
        """Whether all of the prompt is in the KV cache, so that decode steps follow."""
        return self.num_computed >= len(self.prompt_token_ids)

    @cached_property
    def prompt_array(self) -> NDArray[np.int64]:
        """`prompt_token_ids`, made an array once: of a long prompt, that takes longer than to sample a token."""
        return np.array(self.prompt_token_ids, dtype=np.int64)

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[len(self.prompt_token_ids) :]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.prompt_token_ids)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def output(self) -> RequestOutput:
        """A snapshot for the caller; later steps do not change it."""
        wants_logprobs = self.params.logprobs is not None
        completion = CompletionOutput(
            index=0,
            text=self.text.text,
            token_ids=self.output_token_ids,
            cumulative_logprob=self.cumulative_logprob if wants_logprobs else None,
            logprobs=list(self.logprobs) if wants_logprobs else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion] if self.beams is None else self.completions,
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs if self.params.prompt_logprobs is not None else None,
            num_cached_tokens=self.num_cached_tokens or 0,
            queued_s=0.0 if self.started_at is None else self.started_at - self.arrived_at,
            embedding=self.embedding,
        )
