"""Which requests run next, through which bucket.

A request waits, is prefilled, then decodes one token a step among the other running ones. It leaves when it
is finished or aborted. A prompt longer than a chunk, or than every prefill bucket, is prefilled piece by piece; after
a piece the others decode once before the next.

When a running request needs a KV block and none is free, the last in order is preempted: its blocks are freed, it
waits again, with all the tokens it has, and those are computed again: its prompt by a prefill, its other tokens by
decode steps that sample nothing. (One prefill of them all would be faster, and round differently: greedy output of
bfloat16 models was seen to change.) What of its blocks is still cached then is not computed again: those hold the very
keys and values that it had.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from furiosa_build.artifact.schema import Pipeline
from furiosa_build.core.errors import UserError
from furiosa_build.runtime.request import Request
from furiosa_build.runtime.scheduling.batch import Batch
from furiosa_build.runtime.scheduling.buckets import Buckets, num_rows
from furiosa_build.runtime.scheduling.kv_cache import BlockManager
from furiosa_build.runtime.scheduling.prefill import Prefill
from furiosa_build.runtime.scheduling.queues import RequestQueues, sequences_with_blocks
from furiosa_build.runtime.stats import BucketUse, EngineStats


class Scheduler:
    """Continuous batching over the buckets of an artifact.

    `prefill_chunk_size` is the most tokens of a prompt that run at once; None: as many as a bucket takes. With
    `enable_prefix_caching` a request that comes in begins with the KV blocks of those before it whose tokens began
    as its own do, where that spares work.

    The order is first come, first served: a request that must wait for KV blocks is not overtaken. Admission leaves
    `spare_blocks_ratio` of the blocks to the requests that run, so that they are seldom preempted; with none
    running the head of the queue is always admitted, so that there is always progress.

    A draft model may propose `num_speculative_tokens` tokens of a request at a time: see `wanted_proposals`.

    With `is_offline` only the time until all are finished counts. The longest prompts come first: so prompts of like
    length share a prefill, and contexts of like length a decode step, with little padding. Prompts are prefilled as
    long as decode batches have rows for them, pieces without decode steps between them, so that as many as can decode
    together.
    """

    def __init__(
        self,
        pipelines: Iterable[Pipeline],
        blocks: BlockManager,
        *,
        spare_blocks_ratio: float,
        prefill_chunk_size: int | None = None,
        is_offline: bool = False,
        num_stages: int = 1,
        enable_prefix_caching: bool = True,
        num_speculative_tokens: int = 0,
    ) -> None:
        self.blocks = blocks
        pipelines = list(pipelines)
        self._buckets = Buckets(pipelines, prefill_chunk_size)
        self._bucket_use = {
            p.name: BucketUse(p.phase, p.batch_size, p.query_length, p.context_length) for p in pipelines
        }
        self._queues = RequestQueues(blocks, is_offline)
        self._prefill = Prefill(
            self._queues,
            self._buckets,
            spare_blocks=int(spare_blocks_ratio * blocks.num_blocks),
            enable_prefix_caching=enable_prefix_caching,
        )
        self._num_stages = num_stages
        self._enable_prefix_caching = enable_prefix_caching
        self._num_speculative_tokens = num_speculative_tokens
        # Batches of prompts since the last decode step.
        self._prefills_in_a_row = 0
        # A piece of a prompt has run since the last decode step.
        self._owes_decode = False
        self._preemptions = 0

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that prefill and append buckets take."""
        return self._buckets.max_prompt_tokens

    @property
    def max_context(self) -> int:
        """The longest context of a decode bucket: a request of more tokens cannot take another step."""
        return self._buckets.max_context

    @property
    def num_unfinished(self) -> int:
        return self._queues.num_unfinished

    @property
    def running(self) -> Sequence[Request]:
        """The requests that have KV blocks."""
        return tuple(self._queues.running)

    @property
    def request_ids(self) -> list[str]:
        """The ids of the requests that wait and of those that run."""
        return [request.request_id for request in (*self._queues.waiting, *self._queues.running)]

    @property
    def in_flight(self) -> frozenset[Request]:
        """The requests of batches that have been scheduled and have not advanced."""
        return frozenset(self._queues.in_flight)

    def add(self, request: Request) -> None:
        """Queues a new request.

        Raises:
            UserError: A prompt that no bucket takes; more KV blocks than there are.
        """
        _refuse_if_impossible(request, self._buckets, self.blocks)
        self._queues.add(request)

    def schedule(self) -> Batch | None:
        """The next batch; None when no request can run now. Its requests hold KV slots for the tokens to run.

        They are in flight, and in no other batch, until `advance`.
        """
        batch = self._schedule_decode() if self._owes_decode and not self._queues.is_offline else None
        # A prefill may admit a request whose prompt is cached as a whole, and that decodes.
        batch = batch or self._prefill.schedule() or self._schedule_decode()
        if batch is not None:
            self._prefills_in_a_row = 0 if batch.pipeline.phase == "decode" else self._prefills_in_a_row + 1
            # Prompts that end with their first token take no row, so that rows alone would not end such a series.
            self._owes_decode = self._prefills_in_a_row >= self._buckets.max_rows or any(
                request.num_computed + count < len(request.prompt_token_ids)
                for request, count in zip(batch.requests, batch.counts, strict=True)
            )
            self._queues.in_flight.update(batch.requests)
        return batch

    def advance(self, batch: Batch) -> list[Request]:
        """Records that `batch` has run. Returns the requests whose next token its logits give.

        Proposals do not count as computed before they are accepted.
        """
        tokens = sum(n * len(batch.sequences(r)) for r, n in zip(batch.requests, batch.counts, strict=True))
        self._bucket_use[batch.pipeline.name] = self._bucket_use[batch.pipeline.name].plus(1, tokens)
        present = []
        for request, count in zip(batch.requests, batch.counts, strict=True):
            request.num_computed += count - len(request.proposals)
            if self._enable_prefix_caching:
                for sequence in batch.sequences(request):
                    self.blocks.cache_full_blocks(sequence, sequence.tokens, request.num_computed)
            if request.num_computed == len(request.prompt_token_ids):
                for sequence in request.sequences[1:]:  # beams whose tokens are computed again
                    self.blocks.fork(request.sequences[0], sequence, request.num_computed)
            if self._queues.land(request):
                present.append(request)
        return [request for request in present if request.num_computed == len(request.tokens)]

    def requeue(self, batch: Batch) -> None:
        """Queues the requests of a batch that has failed to run again; all their tokens are recomputed."""
        for request in batch.requests:
            if self._queues.land(request):
                self._queues.requeue(request)

    def preempt(self, request: Request) -> None:
        """Frees the blocks of a running request that is not in flight, and queues it again."""
        self._preemptions += 1
        self._queues.requeue(request)

    def invalidate_cache(self, request: Request) -> None:
        """Removes from the cache what a running request has computed, so that no other begins with it."""
        for sequence in sequences_with_blocks(request):
            self.blocks.invalidate(sequence)

    def remove(self, request: Request) -> None:
        """Removes a request, finished or not, and frees its blocks; if it is in flight, when its batch has run."""
        self._queues.remove(request)

    def stats(self) -> EngineStats:
        """Counts since the start, and the present load."""
        return EngineStats(
            prompt_tokens=self._prefill.prompt_tokens,
            cached_tokens=self._prefill.cached_tokens,
            preemptions=self._preemptions,
            running=len(self._queues.running),
            waiting=len(self._queues.waiting),
            kv_blocks_used=self.blocks.num_blocks - self.blocks.num_free,
            kv_blocks=self.blocks.num_blocks,
            buckets=dict(self._bucket_use),
        )

    def check_integrity(self) -> None:
        """Raises RuntimeError when requests and blocks are inconsistent."""
        self._queues.check_integrity()

    # Decode

    def _schedule_decode(self) -> Batch | None:
        queues = self._queues
        while candidates := [r for r in queues.running if r.is_prompt_computed and r not in queues.in_flight]:
            group = self._next_group(candidates)
            if not group:
                raise RuntimeError("no decode bucket holds the context of any running request")
            self._reserve(group)
            group = [request for request in group if request in queues.running]
            if group:
                # Those that run go to the back of the line; when all fit, the order stays.
                queues.running = [request for request in queues.running if request not in group] + group
                pipeline = self._buckets.for_decode(group)
                assert pipeline is not None, "what holds a group holds a part of it"
                return Batch(pipeline, group, [1] * len(group))
            # All of the group were preempted for older requests, whose turn it is then.
        return None

    def _next_group(self, candidates: Sequence[Request]) -> list[Request]:
        """Whoever has waited longest for a step, and all after it who fit into a bucket together with it."""
        group: list[Request] = []
        # While one stage works on a batch, the next one works on another.
        most = -(-num_rows(self._queues.running) // self._num_stages)
        for request in candidates:
            joined = [*group, request]
            if (not group or num_rows(joined) <= most) and self._buckets.for_decode(joined) is not None:
                group.append(request)
        return group

    def _reserve(self, group: Sequence[Request]) -> None:
        """Reserves slots for the token that each of `group` is to run, and for those that a draft may propose.

        Preempts the last in order while there are too few blocks.
        """
        queues = self._queues
        for request in sorted(group, key=queues.priority):
            while request in queues.running and not self._reserve_next(request):
                self.preempt(max((r for r in queues.running if r not in queues.in_flight), key=queues.priority))

    def _reserve_next(self, request: Request) -> bool:
        needed = request.num_computed + 1 + self._num_proposals(request)
        missing = sum(self.blocks.missing(sequence, needed) for sequence in request.sequences)
        if missing > self.blocks.num_free:
            return False
        for sequence in request.sequences:
            self.blocks.reserve(sequence, needed)
        return True

    # Speculation

    def wanted_proposals(self, batch: Batch) -> dict[Request, int]:
        """The requests of a decode batch whose next token it gives, and how many after that a draft may propose.

        Empty where no append bucket could run them. There are KV slots for them.
        """
        if batch.pipeline.phase != "decode" or any(request.beams is not None for request in batch.requests):
            return {}
        numbers = [self._num_proposals(request) for request in batch.requests]
        if self._for_proposals(batch, numbers) is None:
            return {}
        return {request: number for request, number in zip(batch.requests, numbers, strict=True) if number > 0}

    def with_proposals(self, batch: Batch) -> Batch:
        """The decode batch, or one that also runs what has been proposed to its requests: in an append bucket."""
        numbers = [len(request.proposals) for request in batch.requests]
        if not any(numbers):
            return batch
        pipeline = self._for_proposals(batch, numbers)
        assert pipeline is not None, "what runs the wanted ones runs fewer"
        return replace(batch, pipeline=pipeline, counts=[1 + number for number in numbers])

    def _for_proposals(self, batch: Batch, numbers: Sequence[int]) -> Pipeline | None:
        starts = [request.num_computed for request in batch.requests]
        return self._buckets.for_prefill(starts, [1 + number for number in numbers])

    def _num_proposals(self, request: Request) -> int:
        """The number of tokens after its next one that a draft may propose: none that could not be used."""
        if request.beams is not None or request.num_computed < len(request.tokens) - 1:
            return 0
        most = self.max_context - len(request.tokens)
        if request.params.max_tokens is not None:
            most = min(most, request.params.max_tokens - request.num_generated - 1)
        return max(0, min(self._num_speculative_tokens, most))


def _refuse_if_impossible(request: Request, buckets: Buckets, blocks: BlockManager) -> None:
    """Raises UserError for a request that no bucket takes, or that may need more KV blocks than there are."""
    where = f"request {request.request_id!r}"
    prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
    if prompt > buckets.max_prompt_tokens:
        names = ", ".join(buckets.prefill_names) or "none"
        raise UserError(
            f"the prompt has {prompt} tokens, more than any prefill or append bucket takes",
            where=where,
            valid=f"at most {buckets.max_prompt_tokens} tokens; buckets: {names}",
        )
    # The token that is sampled last is never run, and nothing runs beyond the largest context.
    longest = buckets.max_context if max_tokens is None else min(prompt + max_tokens - 1, buckets.max_context)
    needed = blocks.blocks_for(max(prompt, longest))
    if request.beams is not None:  # each token of a beam may take a block of its own
        needed = blocks.blocks_for(prompt) + request.width * (request.beams.max_tokens - 1)
    if needed > blocks.num_blocks:
        raise UserError(
            f"the request may need {needed} KV blocks, and there are {blocks.num_blocks}",
            where=where,
            hint="raise paged_attention_num_blocks, or lower max_tokens",
        )
