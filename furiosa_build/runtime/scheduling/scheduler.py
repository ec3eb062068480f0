"""Which requests run next, through which bucket.

A request waits, is prefilled, then decodes one token a step among the other running ones. It leaves when it
is finished or aborted. A prompt longer than a chunk, or than every prefill bucket, is prefilled piece by piece; after
a piece the others decode once before the next.

When a running request needs a KV block and none is free, the last in order is preempted: its blocks are taken back, it
waits again, with all the tokens it has, and those are computed again: its prompt by a prefill, its other tokens by
decode steps that sample nothing. (One prefill of them all would be faster, and round differently: greedy output of
bfloat16 models was seen to change.) What of its blocks is still known then is not computed again: those hold the very
keys and values that it had.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from furiosa_build.artifact.schema import Pipeline
from furiosa_build.core.errors import UserError
from furiosa_build.runtime.request import Request, TokenSequence
from furiosa_build.runtime.sampling.beam_search import Continuation
from furiosa_build.runtime.scheduling.buckets import Buckets, num_rows, prefill_cost
from furiosa_build.runtime.scheduling.kv_cache import BlockManager
from furiosa_build.runtime.stats import BucketUse, EngineStats


@dataclass(frozen=True)
class Batch:
    """One run of a bucket: request i runs counts[i] tokens of each of its sequences, from its num_computed on.

    Rows are in the order of requests, and of their sequences.
    """

    pipeline: Pipeline
    requests: list[Request]
    counts: list[int]

    def sequences(self, request: Request) -> list[TokenSequence]:
        """Those that run, each in a row of its own. The prompt runs once for all beams of a search."""
        return request.sequences if self.pipeline.phase == "decode" else request.sequences[:1]


@dataclass(frozen=True)
class _Candidate:
    """A request of which `count` tokens of its prompt may run next, those from `start` on.

    One that waits is given the blocks `cached` then.
    """

    request: Request
    start: int
    count: int
    cached: Sequence[int] = ()


class Scheduler:
    """Continuous batching over the buckets of an artifact.

    `prefill_chunk_size` is the most tokens of a prompt that run at once; None: as many as a bucket takes.

    With `enable_prefix_caching` a request that comes in begins with the KV blocks of those before it whose tokens began
    as its own do, where that spares work: see `_find_cached`.

    The order is first come, first served: a request that must wait for KV blocks is not overtaken. Admission leaves
    `spare_blocks_ratio` of the blocks to the requests that run, so that they are seldom preempted; with none
    running the head of the queue is always admitted, so that there is always progress.

    A draft model may propose `num_speculative_tokens` tokens of a request at a time: see `wanted_proposals`.

    With `is_offline` only the time until all are finished counts. The longest prompts come first: so prompts of like
    length share a prefill, and contexts of like length a decode step, with little padding. Prompts are prefilled as
    long as there are places, pieces without decode steps between them, so that as many as can decode together.
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
        self._spare_blocks = int(spare_blocks_ratio * blocks.num_blocks)
        self._is_offline = is_offline
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._arrivals = 0
        self._num_stages = num_stages
        self._enable_prefix_caching = enable_prefix_caching
        self._num_speculative_tokens = num_speculative_tokens
        # Requests, not their ids: that of one which leaves while it is in flight may be in use again.
        self._in_flight: set[Request] = set()
        self._leaving: set[Request] = set()
        # Of prompts, since the last decode step.
        self._prefills_in_a_row = 0
        # A piece of a prompt has run since the last decode step.
        self._owes_decode = False
        self._prompt_tokens = self._cached_tokens = self._preemptions = 0

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
        return len(self._waiting) + len(self._running) - len(self._leaving)

    @property
    def request_ids(self) -> list[str]:
        """Of those that wait and those that run."""
        return [request.request_id for request in (*self._waiting, *self._running)]

    @property
    def in_flight(self) -> frozenset[Request]:
        """The requests of batches that have been scheduled and have not advanced."""
        return frozenset(self._in_flight)

    def add(self, request: Request) -> None:
        """Queues a new request.

        Raises:
            UserError: A prompt that no bucket takes; more KV blocks than there are.
        """
        self._refuse_if_impossible(request)
        request.arrival = self._arrivals
        self._arrivals += 1
        insort(self._waiting, request, key=self._turn)

    def schedule(self) -> Batch | None:
        """The next batch; None when no request can run now. Its requests hold KV slots for the tokens to run.

        They are in flight, and in no other batch, until `advance`.
        """
        batch = self._schedule_decode() if self._owes_decode and not self._is_offline else None
        # A prefill may admit a request whose prompt is cached as a whole, and that decodes.
        batch = batch or self._schedule_prefill() or self._schedule_decode()
        if batch is not None:
            self._prefills_in_a_row = 0 if batch.pipeline.phase == "decode" else self._prefills_in_a_row + 1
            # Prompts that end with their first token take no place, so that places alone would not end such a row.
            self._owes_decode = self._prefills_in_a_row >= self._buckets.max_rows or any(
                request.num_computed + count < len(request.prompt_token_ids)
                for request, count in zip(batch.requests, batch.counts, strict=True)
            )
            self._in_flight.update(batch.requests)
        return batch

    def wanted_proposals(self, batch: Batch) -> dict[Request, int]:
        """The requests of a decode batch whose next token it gives, and how many after that a draft may propose.

        None where no append bucket could run them. There are KV slots for them.
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

    def advance(self, batch: Batch) -> list[Request]:
        """Notes that `batch` has run. Returns the requests whose next token its logits give.

        Proposals do not count as computed before they are accepted.
        """
        tokens = sum(n * len(batch.sequences(r)) for r, n in zip(batch.requests, batch.counts, strict=True))
        self._bucket_use[batch.pipeline.name] = self._bucket_use[batch.pipeline.name].plus(1, tokens)
        for request, count in zip(batch.requests, batch.counts, strict=True):
            request.num_computed += count - len(request.proposals)
            if self._enable_prefix_caching:
                for sequence in batch.sequences(request):
                    self.blocks.note(sequence, sequence.tokens, request.num_computed)
            if request.num_computed == len(request.prompt_token_ids):
                for sequence in request.sequences[1:]:  # beams whose tokens are computed again
                    self.blocks.fork(request.sequences[0], sequence, request.num_computed)
            self._in_flight.remove(request)
            if request in self._leaving:
                self._leaving.remove(request)
                self.remove(request)
        return [
            request
            for request in batch.requests
            if request in self._running and request.num_computed == len(request.tokens)
        ]

    def take_back(self, batch: Batch) -> None:
        """Notes that `batch` has failed to run: its requests wait again, and all their tokens are computed again."""
        for request in batch.requests:
            self._in_flight.remove(request)
            if request in self._leaving:
                self._leaving.remove(request)
                self.remove(request)
            else:
                self._queue_again(request)

    def distrust(self, request: Request) -> None:
        """Has no request begin with what a running one has computed."""
        for sequence in _with_blocks(request):
            self.blocks.forget(sequence)

    def remove(self, request: Request) -> None:
        """Forgets a request, finished or not, and frees its blocks: of one that is in flight when it has run."""
        if request in self._in_flight:
            self._leaving.add(request)
        elif request in self._running:
            self._running.remove(request)
            self._free_blocks(request)
        else:
            self._waiting.remove(request)

    def continue_beams(self, request: Request, continuations: Sequence[Continuation]) -> None:
        """Replaces the sequences of a beam search, all of whose tokens are computed, by those that continue them.

        The first that continues a sequence takes its place and its KV blocks, others share them. The blocks of those
        that nothing continues are free, as far as nobody shares them.
        """
        before, after = request.sequences, []
        for continuation in continuations:
            # After the prompt there is one sequence yet, which stands for all beams.
            sequence = before[min(continuation.parent, len(before) - 1)]
            if sequence in after:
                source, sequence = sequence, TokenSequence(list(sequence.tokens))
                self.blocks.fork(source, sequence, request.num_computed)
            after.append(sequence)
        for sequence in before:
            if sequence not in after:
                self.blocks.free(sequence)
        for sequence, continuation in zip(after, continuations, strict=True):
            sequence.tokens.append(continuation.token)
        request.sequences = after

    def stats(self) -> EngineStats:
        """Counts since it was made, and what is under way now."""
        return EngineStats(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            preemptions=self._preemptions,
            running=len(self._running),
            waiting=len(self._waiting),
            kv_blocks_used=self.blocks.num_blocks - self.blocks.num_free,
            kv_blocks=self.blocks.num_blocks,
            buckets=dict(self._bucket_use),
        )

    def check_integrity(self) -> None:
        """Raises RuntimeError when requests and blocks do not agree."""
        self.blocks.check_integrity()
        if len({*self._running, *self._waiting}) != len(self._running) + len(self._waiting):
            raise RuntimeError("a request is queued twice")
        running = sorted(request.request_id for request in self._running)
        if not self._leaving <= self._in_flight <= set(self._running):
            in_flight = sorted(request.request_id for request in self._in_flight)
            raise RuntimeError(f"in flight are {in_flight}, but running are {running}")
        owners = [sequence for request in self._running for sequence in _with_blocks(request)]
        if self.blocks.owners() != set(owners):
            raise RuntimeError(f"KV blocks of {self.blocks.owners()}, but running are {running}")
        written: set[int] = set()
        for request in self._running:
            for sequence in _with_blocks(request):
                slots = self.blocks.slots(sequence).tolist()
                if len(slots) < request.num_computed:
                    raise RuntimeError(f"{request.request_id!r} has fewer KV slots than computed tokens")
                if len({len(sequence.tokens) for sequence in request.sequences}) > 1:
                    raise RuntimeError(f"the beams of {request.request_id!r} are of different lengths")
                to_write = set(slots[request.num_computed :])
                if to_write & written:
                    raise RuntimeError(f"{request.request_id!r} is to write to a slot that another sequence writes to")
                written |= to_write
        if any(request.num_computed for request in self._waiting):
            raise RuntimeError("a waiting request counts tokens as computed")

    def _turn(self, request: Request) -> tuple[int, int]:
        """The place in the order of all requests: who is served first, and preempted last."""
        return -len(request.prompt_token_ids) if self._is_offline else 0, request.arrival

    # Prefill

    def _schedule_prefill(self) -> Batch | None:
        """Pieces of prompts: those begun come before the head of the queue, and as many as make a token cheapest."""
        begun = [self._candidate(request) for request in self._running if self._is_in_prompt(request)]
        # Requests that gave way, and whose prompts are still in the cache as a whole: they decode. The blocks that they
        # take may be those that others could have begun with, so these are looked for anew.
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
        start = request.num_computed + len(cached) * self.blocks.block_size
        length = len(request.prompt_token_ids)
        count = self._buckets.next_piece(start, length) if start < length else 0
        return _Candidate(request, start, count, cached)

    def _is_in_prompt(self, request: Request) -> bool:
        """Whether more of a running request's prompt is to run now."""
        return not request.is_prompt_computed and request not in self._in_flight

    def _admissible(self) -> list[_Candidate]:
        """The longest head of the queue for which there are blocks and places."""
        chosen: list[_Candidate] = []
        free = self.blocks.num_free
        rows = num_rows(self._running)
        for request in self._waiting:
            rows += request.width
            if rows > self._buckets.max_rows:
                break
            cached = self._find_cached(request)
            spare = self._spare_blocks if self._running or chosen else 0
            free -= self._blocks_to_admit(request) - len(cached) + self.blocks.num_unused(cached)
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
        if len(tokens) == prompt and not self._buckets.can_cut(prompt):
            return []
        found = self.blocks.find(tokens, len(tokens) - 1)
        start = len(found) * self.blocks.block_size
        if start < prompt and not (
            self._buckets.can_cut(prompt)
            and self._buckets.cost_of_prompt(start, prompt) < self._buckets.cost_of_prompt(0, prompt)
        ):
            return []
        return found

    def _blocks_to_admit(self, request: Request) -> int:
        """For all tokens that are known. Beams share those of the prompt only, when they are computed again."""
        if request.beams is None:
            return self.blocks.blocks_for(len(request.tokens))
        own = self.blocks.blocks_for(request.num_generated)
        return self.blocks.blocks_for(len(request.prompt_token_ids)) + request.width * own

    def _admit(self, candidates: Sequence[_Candidate]) -> None:
        for each in candidates:  # before any takes free blocks, which may be those that another begins with
            self.blocks.adopt(each.request.sequences[0], each.cached)
        for each in candidates:
            request, prompt = each.request, each.request.prompt_token_ids
            tokens = request.tokens if request.beams is None else prompt
            self.blocks.reserve(request.sequences[0], len(tokens))
            request.num_computed = each.start
            if request.num_cached_tokens is None:
                request.num_cached_tokens = each.start
                self._prompt_tokens += len(prompt)
                self._cached_tokens += each.start
            self._running.append(request)
        del self._waiting[: len(candidates)]

    # Decode

    def _schedule_decode(self) -> Batch | None:
        while candidates := [request for request in self._running if self._is_decoding(request)]:
            group = self._next_group(candidates)
            if not group:
                raise RuntimeError("no decode bucket holds the context of any running request")
            self._make_room(group)
            group = [request for request in group if request in self._running]
            if group:
                # Those that run go to the back of the line; when all fit, the order stays.
                self._running = [request for request in self._running if request not in group] + group
                pipeline = self._buckets.for_decode(group)
                assert pipeline is not None, "what holds a group holds a part of it"
                return Batch(pipeline, group, [1] * len(group))
            # All of the group gave way to older requests, whose turn it is then.
        return None

    def _is_decoding(self, request: Request) -> bool:
        """Whether a running request can take a decode step now."""
        return request.is_prompt_computed and request not in self._in_flight

    def _next_group(self, candidates: Sequence[Request]) -> list[Request]:
        """Whoever has waited longest for a step, and all after it who fit into a bucket together with it."""
        group: list[Request] = []
        # While one stage works on a batch, the next one works on another.
        most = -(-num_rows(self._running) // self._num_stages)
        for request in candidates:
            joined = [*group, request]
            if (not group or num_rows(joined) <= most) and self._buckets.for_decode(joined) is not None:
                group.append(request)
        return group

    def _make_room(self, group: Sequence[Request]) -> None:
        """Reserves slots for the token that each of `group` is to run, and for those that a draft may propose."""
        for request in sorted(group, key=self._turn):
            while request in self._running and not self._reserve_next(request):
                idle = [request for request in self._running if request not in self._in_flight]
                self._preempt(max(idle, key=self._turn))

    def _for_proposals(self, batch: Batch, numbers: Sequence[int]) -> Pipeline | None:
        starts = [request.num_computed for request in batch.requests]
        return self._buckets.for_prefill(starts, [1 + number for number in numbers])

    def _num_proposals(self, request: Request) -> int:
        """How many tokens after its next one a draft may propose: none that could not be used."""
        if request.beams is not None or request.num_computed < len(request.tokens) - 1:
            return 0
        room = self.max_context - len(request.tokens)
        if request.params.max_tokens is not None:
            room = min(room, request.params.max_tokens - request.num_generated - 1)
        return max(0, min(self._num_speculative_tokens, room))

    def _reserve_next(self, request: Request) -> bool:
        needed = request.num_computed + 1 + self._num_proposals(request)
        missing = sum(self.blocks.missing(sequence, needed) for sequence in request.sequences)
        if missing > self.blocks.num_free:
            return False
        for sequence in request.sequences:
            self.blocks.reserve(sequence, needed)
        return True

    def _free_blocks(self, request: Request) -> None:
        for sequence in _with_blocks(request):
            self.blocks.free(sequence)

    def _preempt(self, request: Request) -> None:
        self._preemptions += 1
        self._queue_again(request)

    def _queue_again(self, request: Request) -> None:
        """Takes the blocks of a running request back, which then waits for others."""
        self._running.remove(request)
        self._free_blocks(request)
        request.num_computed = 0
        request.proposals = []
        insort(self._waiting, request, key=self._turn)

    # Refusal

    def _refuse_if_impossible(self, request: Request) -> None:
        where = f"request {request.request_id!r}"
        prompt, max_tokens = len(request.prompt_token_ids), request.params.max_tokens
        if prompt > self.max_prompt_tokens:
            buckets = ", ".join(self._buckets.prefill_names) or "none"
            raise UserError(
                f"the prompt has {prompt} tokens, more than any prefill or append bucket takes",
                where=where,
                valid=f"at most {self.max_prompt_tokens} tokens; buckets: {buckets}",
            )
        # The token that is sampled last is never run, and nothing runs beyond the largest context.
        longest = self.max_context if max_tokens is None else min(prompt + max_tokens - 1, self.max_context)
        needed = self.blocks.blocks_for(max(prompt, longest))
        if request.beams is not None:  # each token of a beam may take a block of its own
            needed = self.blocks.blocks_for(prompt) + request.width * (request.beams.max_tokens - 1)
        if needed > self.blocks.num_blocks:
            raise UserError(
                f"the request may need {needed} KV blocks, and there are {self.blocks.num_blocks}",
                where=where,
                hint="raise paged_attention_num_blocks, or lower max_tokens",
            )


def _with_blocks(request: Request) -> list[TokenSequence]:
    """The sequences of a running request that have KV blocks: until the prompt is computed, the first alone."""
    return request.sequences if request.is_prompt_computed else request.sequences[:1]
