"""Which requests run next, through which bucket.

A request waits, is prefilled, then decodes one token a step among the other running ones. It leaves when it
is finished or aborted. When a running request needs a KV block and none is free, the youngest one is
preempted: its blocks are taken back, it waits at the head of the queue with all the tokens it has, and those
are computed again: its prompt by a prefill, its other tokens by decode steps that sample nothing. (One prefill of
them all would be faster, and round differently: greedy output of bfloat16 models was seen to change.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from furiosa_build.artifact.schema import Pipeline
from furiosa_build.errors import UserError
from furiosa_build.runtime.kv_cache import BlockManager
from furiosa_build.runtime.request import Request

# A prefill reads all weights once, whatever its size. On CPUs with matrix units that takes as long as
# computing about this many tokens, so below it, padding is free and batching pays.
_TOKENS_PER_WEIGHT_READ = 48


@dataclass(frozen=True)
class Batch:
    """One run of a bucket: request i runs counts[i] tokens, from its num_computed on, in row i."""

    pipeline: Pipeline
    requests: list[Request]
    counts: list[int]


class Scheduler:
    """Continuous batching over the buckets of an artifact.

    Admission is first come, first served: a request that must wait for KV blocks is not overtaken. It leaves
    `spare_blocks_ratio` of the blocks to the requests that run, so that they are seldom preempted; with none
    running the head of the queue is always admitted, so that there is always progress.
    """

    def __init__(
        self,
        pipelines: Iterable[Pipeline],
        blocks: BlockManager,
        *,
        spare_blocks_ratio: float,
        max_processing_samples: int,
        num_stages: int = 1,
    ) -> None:
        pipelines = list(pipelines)
        self.blocks = blocks
        # The cheapest first, so that the first that fits is the one to take.
        self._prefill = sorted((p for p in pipelines if p.phase == "prefill"), key=_prefill_cost)
        self._decode = sorted((p for p in pipelines if p.phase == "decode"), key=_decode_cost)
        self._max_running = max((p.batch_size for p in self._decode or self._prefill), default=0)
        self._spare_blocks = int(spare_blocks_ratio * blocks.num_blocks)
        self._max_processing_samples = max_processing_samples
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._arrivals = 0
        self._num_stages = num_stages
        self._in_flight: set[str] = set()
        self._leaving: set[str] = set()

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt a prefill bucket takes."""
        return max((p.query_length for p in self._prefill), default=0)

    @property
    def max_context(self) -> int:
        """The longest context of a decode bucket: a request of more tokens cannot take another step."""
        return max((p.context_length for p in self._decode), default=0)

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running) - len(self._leaving)

    @property
    def is_full(self) -> bool:
        """Whether `max_processing_samples` requests are under way."""
        return self.num_unfinished >= self._max_processing_samples

    def add(self, request: Request) -> None:
        """Queues a new request.

        Raises:
            UserError: Too many requests; a prompt over every prefill bucket; more KV blocks than there are.
        """
        self._refuse_if_impossible(request)
        request.arrival = self._arrivals
        self._arrivals += 1
        self._waiting.append(request)

    def schedule(self) -> Batch | None:
        """The next batch; None when no request can run now. Its requests hold KV slots for the tokens to run.

        They are in flight, and in no other batch, until `advance`.
        """
        batch = self._schedule_prefill() or self._schedule_decode()
        if batch is not None:
            self._in_flight.update(request.request_id for request in batch.requests)
        return batch

    def advance(self, batch: Batch) -> list[Request]:
        """Notes that `batch` has run. Returns the requests whose next token its logits give."""
        for request, count in zip(batch.requests, batch.counts, strict=True):
            request.num_computed += count
            self._in_flight.remove(request.request_id)
            if request.request_id in self._leaving:
                self._leaving.remove(request.request_id)
                self.remove(request)
        return [
            request
            for request in batch.requests
            if request in self._running and request.num_computed == len(request.tokens)
        ]

    def remove(self, request: Request) -> None:
        """Forgets a request, finished or not, and frees its blocks: of one that is in flight when it has run."""
        if request.request_id in self._in_flight:
            self._leaving.add(request.request_id)
        elif request in self._running:
            self._running.remove(request)
            self.blocks.free(request.request_id)
        else:
            self._waiting.remove(request)

    def check_integrity(self) -> None:
        """Raises RuntimeError when requests and blocks do not agree."""
        self.blocks.check_integrity()
        running = {request.request_id for request in self._running}
        waiting = {request.request_id for request in self._waiting}
        if len(running | waiting) != len(self._running) + len(self._waiting):
            raise RuntimeError("a request is queued twice")
        if self.blocks.owners() != running:
            raise RuntimeError(f"KV blocks of {sorted(self.blocks.owners())}, but running are {sorted(running)}")
        for request in self._running:
            if len(self.blocks.slots(request.request_id)) < request.num_computed:
                raise RuntimeError(f"{request.request_id!r} has fewer KV slots than computed tokens")
        if any(request.num_computed for request in self._waiting):
            raise RuntimeError("a waiting request counts tokens as computed")

    # Prefill

    def _schedule_prefill(self) -> Batch | None:
        """The head of the queue, and as many after it as make a token of the batch cheapest."""
        candidates = self._admissible()
        best: tuple[Pipeline, int] | None = None
        best_cost = float("inf")
        for number in range(1, len(candidates) + 1):
            counts = [len(request.prompt_token_ids) for request in candidates[:number]]
            pipeline = next((p for p in self._prefill if _fits_prefill(p, counts)), None)
            if pipeline is None:
                break
            cost = _prefill_cost(pipeline) / sum(counts)
            if cost <= best_cost:
                best, best_cost = (pipeline, number), cost
        if best is None:
            return None
        pipeline, number = best
        return Batch(pipeline, *self._admit(number))

    def _admissible(self) -> list[Request]:
        """The longest head of the queue for which there are blocks and places."""
        chosen: list[Request] = []
        free = self.blocks.num_free
        for request in self._waiting:
            if len(self._running) + len(chosen) >= self._max_running:
                break
            spare = self._spare_blocks if self._running or chosen else 0
            free -= self.blocks.blocks_for(len(request.tokens))
            if free < spare:
                break
            chosen.append(request)
        return chosen

    def _admit(self, number: int) -> tuple[list[Request], list[int]]:
        requests = [self._waiting.popleft() for _ in range(number)]
        for request in requests:
            self.blocks.reserve(request.request_id, len(request.tokens))
        self._running += requests
        return requests, [len(request.prompt_token_ids) for request in requests]

    # Decode

    def _schedule_decode(self) -> Batch | None:
        while any(request.request_id not in self._in_flight for request in self._running):
            group = self._next_group()
            if not group:
                raise RuntimeError("no decode bucket holds the context of any running request")
            self._make_room(group)
            group = [request for request in group if request in self._running]
            if group:
                # Those that run go to the back of the line; when all fit, the order stays.
                self._running = [request for request in self._running if request not in group] + group
                return Batch(self._decode_bucket(group), group, [1] * len(group))
            # All of the group gave way to older requests, whose turn it is then.
        return None

    def _next_group(self) -> list[Request]:
        """Whoever has waited longest for a step, and all after it who fit into a bucket together with it."""
        group: list[Request] = []
        # While one stage works on a batch, the next one works on another.
        most = -(-len(self._running) // self._num_stages)
        for request in self._running:
            if request.request_id in self._in_flight or len(group) == most:
                continue
            if any(_fits_decode(p, [*group, request]) for p in self._decode):
                group.append(request)
        return group

    def _decode_bucket(self, group: Sequence[Request]) -> Pipeline:
        return next(p for p in self._decode if _fits_decode(p, group))

    def _make_room(self, group: Sequence[Request]) -> None:
        """Reserves a slot for the token that each of `group` is to run; the oldest are served first."""
        for request in sorted(group, key=lambda request: request.arrival):
            while request in self._running and not self._reserve_next(request):
                idle = [request for request in self._running if request.request_id not in self._in_flight]
                self._preempt(max(idle, key=lambda request: request.arrival))

    def _reserve_next(self, request: Request) -> bool:
        needed = request.num_computed + 1
        if not self.blocks.can_reserve(request.request_id, needed):
            return False
        self.blocks.reserve(request.request_id, needed)
        return True

    def _preempt(self, request: Request) -> None:
        self._running.remove(request)
        self.blocks.free(request.request_id)
        request.num_computed = 0
        # Everyone waiting is younger, except those preempted before, and they were younger than this one.
        self._waiting.appendleft(request)

    # Refusal

    def _refuse_if_impossible(self, request: Request) -> None:
        where = f"request {request.request_id!r}"
        prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
        if self.is_full:
            limit = self._max_processing_samples
            raise UserError(
                f"{limit} requests are under way, no more are taken",
                where="max_processing_samples",
                valid=f"<= {limit}",
            )
        if prompt > self.max_prompt_tokens:
            buckets = ", ".join(f"{p.batch_size}x{p.query_length}" for p in self._prefill) or "none"
            raise UserError(
                f"the prompt has {prompt} tokens, more than any prefill bucket takes",
                where=where,
                valid=f"at most {self.max_prompt_tokens} tokens; prefill buckets (batch x tokens): {buckets}",
            )
        # The token that is sampled last is never run, and nothing runs beyond the largest context.
        longest = self.max_context if max_tokens is None else min(prompt + max_tokens - 1, self.max_context)
        needed = self.blocks.blocks_for(max(prompt, longest))
        if needed > self.blocks.num_blocks:
            raise UserError(
                f"the request may need {needed} KV blocks, and there are {self.blocks.num_blocks}",
                where=where,
                hint="raise paged_attention_num_blocks, or lower max_tokens",
            )


def _prefill_cost(pipeline: Pipeline) -> int:
    return _TOKENS_PER_WEIGHT_READ + pipeline.batch_size * pipeline.query_length


def _fits_prefill(pipeline: Pipeline, counts: Sequence[int]) -> bool:
    return len(counts) <= pipeline.batch_size and max(counts) <= pipeline.query_length


def _decode_cost(pipeline: Pipeline) -> tuple[int, int]:
    # Slots read, mostly; of two that read as many, the smaller batch computes less.
    return pipeline.batch_size * pipeline.context_length, pipeline.batch_size


def _fits_decode(pipeline: Pipeline, group: Sequence[Request]) -> bool:
    return len(group) <= pipeline.batch_size and all(
        request.num_computed < pipeline.context_length for request in group
    )
