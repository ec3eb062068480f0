"""Turns logits into the next token of a request, its text and its end; or into the next step of its beam search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from numpy.typing import NDArray

from furiosa_build.backends.device import as_float32
from furiosa_build.runtime.request import CompletionOutput, Logprob, Request
from furiosa_build.runtime.sampling.beam_search import Continuation, FinishedBeam
from furiosa_build.runtime.sampling.guided import Guide
from furiosa_build.runtime.sampling.sampler import Proposal, sample, top_logprobs
from furiosa_build.runtime.sampling.selection import Floats
from furiosa_build.runtime.text.detokenizer import output_text
from furiosa_build.runtime.text.tokenizer import Tokenizer

OnLogits = Callable[[str, Floats], None]


class NextToken:
    """Takes logits and continues requests.

    Args:
        tokenizer: The artifact's tokenizer; None: texts stay empty.
        max_context: The longest context that can be run.
        on_logits: Called with the request id and the float32 logits [vocab] of every position that is sampled from.
    """

    def __init__(self, tokenizer: Tokenizer | None, max_context: int, on_logits: OnLogits | None) -> None:
        self._tokenizer = tokenizer
        self._max_context = max_context
        self._on_logits = on_logits

    def choose(self, request: Request, logits: Floats) -> int:
        """Gives a request its next tokens, and finishes it if the last of them is its last.

        These are what a draft has proposed, as far as it is accepted, and one more; none at `max_tokens` 0.

        Args:
            request: Its proposals have run, and do not count as computed yet.
            logits: float32 [1 + proposals, vocab]: of its last token and of the proposals.

        Returns:
            How many of the proposals were accepted.
        """
        if request.params.max_tokens == 0:
            request.finish_reason = "length"
            return 0
        proposals, request.proposals = request.proposals, []
        accepted = 0
        for row, proposal in zip_longest(logits, proposals):
            token = self._choose_one(request, row, proposal)
            if proposal is None or token != proposal.token:
                break
            accepted += 1
            request.num_computed += 1
            if request.finished:
                break
        return accepted

    def _choose_one(self, request: Request, logits: Floats, proposal: Proposal | None) -> int:
        self._show(request, logits)
        params, guide = request.params, request.guide
        token = sample(
            logits,
            params,
            prompt=request.prompt_array,
            output=request.output_token_ids,
            forbidden=request.forbidden_tokens(),
            allowed=None if guide is None else guide.allowed,
            generator=request.generator,
            proposal=proposal,
        )
        request.tokens.append(token)
        if guide is not None:
            guide.advance(token)
        if params.logprobs is not None:
            entry = self._logprobs(logits, token, params.logprobs)
            request.logprobs.append(entry)
            request.cumulative_logprob += entry[token].logprob
        if guide is None:
            self._finish_if_due(request, token)
        else:
            self._finish_guided_if_due(request, guide, token)
        return token

    def step_beams(self, request: Request, logits: Floats) -> Sequence[Continuation]:
        """Takes a step of a beam search, and finishes the request if it was the last.

        Args:
            request: Its sequences have not changed since they were run.
            logits: float32 [sequences, vocab].

        Returns:
            How its sequences are to go on; empty if it is finished.
        """
        assert request.beams is not None
        for row in logits:
            self._show(request, row)
        continuations = request.beams.step(logits)
        if not request.beams.is_done:
            return continuations
        best = request.beams.finished[: request.params.n]
        request.completions = [self._completion(request, index, beam) for index, beam in enumerate(best)]
        request.finish_reason = request.completions[0].finish_reason
        return []

    def add_prompt_logprobs(self, request: Request, start: int, rows: NDArray[Any]) -> None:
        """Adds log probabilities of prompt tokens, none twice. `rows` are the logits of the tokens from `start` on."""
        entries, number = request.prompt_logprobs, request.params.prompt_logprobs or 0
        following = request.prompt_token_ids[start + 1 :]
        for position, (row, token) in enumerate(zip(rows, following, strict=False), start=start + 1):
            if position == len(entries):
                entries.append(self._logprobs(as_float32(row), token, number))

    def _show(self, request: Request, logits: Floats) -> None:
        if self._on_logits is not None:
            self._on_logits(request.request_id, logits)

    def _finish_if_due(self, request: Request, token: int) -> None:
        """Extends the text by the new token, unless that ends it, and decides whether it is finished."""
        params = request.params
        if token in request.end_token_ids:  # not before min_tokens: until then they are not sampled
            request.finish_reason = "stop"
            request.stop_reason = token if token in params.stop_token_ids else None
            if params.include_stop_str_in_output:
                request.text.push(token, may_stop=False)
        elif stop := request.text.push(token, may_stop=request.num_generated >= params.min_tokens):
            request.finish_reason, request.stop_reason = "stop", stop
            if params.include_stop_str_in_output:
                request.text.text += stop
            return  # what is held back lies behind the stop string
        elif self._is_at_limit(request):
            request.finish_reason = "length"
        if request.finished:
            request.text.flush()

    def _finish_guided_if_due(self, request: Request, guide: Guide, token: int) -> None:
        """Does the same for a request whose guide says where its text ends."""
        if not (guide.is_complete and token in request.end_token_ids):
            request.text.push(token, may_stop=False)
        if guide.is_complete:
            request.finish_reason = "stop"
        elif guide.error is not None:
            request.finish_reason, request.stop_reason = "length", guide.error
        elif self._is_at_limit(request):
            request.finish_reason = "length"
        if request.finished:
            request.text.flush()

    def _is_at_limit(self, request: Request) -> bool:
        return request.num_generated == request.params.max_tokens or len(request.tokens) > self._max_context

    def _completion(self, request: Request, index: int, beam: FinishedBeam) -> CompletionOutput:
        last, params = beam.tokens[-1], request.params
        ended = last in request.end_token_ids
        tokenizer = self._tokenizer if params.detokenize else None
        text = output_text(tokenizer, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens)
        for token in beam.tokens[:-1] if ended else beam.tokens:
            text.push(token, may_stop=False)
        text.flush()
        return CompletionOutput(
            index=index,
            text=text.text,
            token_ids=beam.tokens,
            cumulative_logprob=beam.cumulative_logprob,
            logprobs=None,
            finish_reason="stop" if ended else "length",
            stop_reason=last if last in params.stop_token_ids else None,
        )

    def _logprobs(self, logits: Floats, token: int, number: int) -> dict[int, Logprob]:
        number = len(logits) if number == -1 else number
        return {
            id_: Logprob(logprob, rank, self._tokenizer.token_bytes.text(id_) if self._tokenizer else None)
            for id_, logprob, rank in top_logprobs(logits, token, number)
        }
