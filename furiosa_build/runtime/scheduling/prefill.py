"""Which prompts run next, and when waiting requests are admitted for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from furiosa_build.artifact.schema import Pipeline
from furiosa_build.runtime.request import Request
from furiosa_build.runtime.scheduling.batch import Batch
from furiosa_build.runtime.scheduling.buckets import Buckets, num_rows, prefill_cost
from furiosa_build.runtime.scheduling.queues import RequestQueues


@dataclass(frozen=True)
class _Candidate:
    """A request of which `count` tokens of its prompt may run next, those from `start` on.

    One that waits is given the blocks `cached` then.
    """

    request: Request
    start: int
    count: int
    cached: Sequence[int] = ()


class Prefill:
    """Schedules prompts.

    Args:
        queues: The requests.
        buckets: The buckets.
        spare_blocks: KV blocks that admission leaves to the requests that run, if there are any.
        enable_prefix_caching: Whether requests begin with cached blocks where that makes their prompts cheaper.

    Attributes:
        prompt_tokens: Tokens of the prompts of all requests that have been admitted; each counts once.
        cached_tokens: The part of these that was in the KV cache.
    """

    def __init__(
        self, queues: RequestQueues, buckets: Buckets, *, spare_blocks: int, enable_prefix_caching: bool
    ) -> None:
        self._queues, self._buckets, self._blocks = queues, buckets, queues.blocks
        self._spare_blocks, self._enable_prefix_caching = spare_blocks, enable_prefix_caching
        self.prompt_tokens = self.cached_tokens = 0

    def schedule(self) -> Batch | None:
        """The next pieces of prompts: those begun, then the head of the queue; as many as make a token cheapest."""
        begun = [self._candidate(request) for request in self._queues.running if self._is_in_prompt(request)]
        # Preempted requests whose prompts are still in the cache as a whole: they decode. The blocks that they take may
        # be those that others could have begun with, so these are looked for anew.
        while whole := list(takewhile(lambda candidate: candidate.count <= 0, admissible := self._admissible())):
            self._admit(whole)
        candidates = [*begun, *takewhile(lambda candidate: candidate.count > 0, admissible)]
        starts, counts = [each.start for each in candidates], [each.count for each in candidates]
        best: tuple[Pipeline, int] | None = None
        best_cost = float("inf")
        for number in range(1, len(candidates) + 1):
            pipeline = self._buckets.for_prefill(starts[:number], counts[:number])
            if pipeline is None:
                break
            cost = prefill_cost(pipeline) / sum(counts[:number])
            if cost <= best_cost:
                best, best_cost = (pipeline, number), cost
        if best is None:
            return None
        pipeline, number = best
        self._admit(candidates[len(begun) : number])
        return Batch(pipeline, [each.request for each in candidates[:number]], counts[:number])

    def _candidate(self, request: Request, cached: Sequence[int] = ()) -> _Candidate:
        start = request.num_computed + len(cached) * self._blocks.block_size
        length = len(request.prompt_token_ids)
        count = self._buckets.next_piece(start, length) if start < length else 0
        return _Candidate(request, start, count, cached)

    def _is_in_prompt(self, request: Request) -> bool:
        """Whether more of a running request's prompt is to run now."""
        return not request.is_prompt_computed and request not in self._queues.in_flight

    def _admissible(self) -> list[_Candidate]:
        """The longest head of the queue for which there are blocks, and rows in a decode batch."""
        chosen: list[_Candidate] = []
        free = self._blocks.num_free
        rows = num_rows(self._queues.running)
        for request in self._queues.waiting:
            rows += request.width
            if rows > self._buckets.max_rows:
                break
            cached = self._find_cached(request)
            spare = self._spare_blocks if self._queues.running or chosen else 0
            free -= self._blocks_to_admit(request) - len(cached) + self._blocks.num_evictable(cached)
            if free < spare:
                break
            chosen.append(self._candidate(request, cached))
        return chosen

    def _find_cached(self, request: Request) -> list[int]:
        """The blocks that a waiting request can begin with; none where they would not make its prompt cheaper.

        What is left of a prompt takes append buckets, which may compute more padding than is spared. The last token is
        always computed, as its logits are needed, and so are all whose logits are asked for.
        """
        prompt = len(request.prompt_token_ids)
        tokens = request.tokens if request.beams is None else request.prompt_token_ids
        if not self._enable_prefix_caching or request.params.prompt_logprobs is not None:
            return []
        if len(tokens) == prompt and not self._buckets.can_split(prompt):
            return []
        found = self._blocks.find_cached(tokens, len(tokens) - 1)
        start = len(found) * self._blocks.block_size
        if start < prompt and not (
            self._buckets.can_split(prompt)
            and self._buckets.cost_of_prompt(start, prompt) < self._buckets.cost_of_prompt(0, prompt)
        ):
            return []
        return found

    def _blocks_to_admit(self, request: Request) -> int:
        """Blocks for all tokens that are known. Recomputed beams share those of the prompt only."""
        if request.beams is None:
            return self._blocks.blocks_for(len(request.tokens))
        own = self._blocks.blocks_for(request.num_generated)
        return self._blocks.blocks_for(len(request.prompt_token_ids)) + request.width * own

    def _admit(self, candidates: Sequence[_Candidate]) -> None:
        for each in candidates:  # before any takes free blocks, which may be those that another begins with
            self._blocks.adopt(each.request.sequences[0], each.cached)
        for each in candidates:
            request, prompt = each.request, each.request.prompt_token_ids
            tokens = request.tokens if request.beams is None else prompt
            self._blocks.reserve(request.sequences[0], len(tokens))
            request.num_computed = each.start
            if request.num_cached_tokens is None:
                request.num_cached_tokens = each.start
                self.prompt_tokens += len(prompt)
                self.cached_tokens += each.start
        self._queues.admit_head(len(candidates))
