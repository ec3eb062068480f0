"""The draft model of speculative decoding: it proposes the next tokens of requests, one decode step after the other.

It has programs, parameters and KV blocks of its own, and keeps up with the requests: what it has not computed yet of a
request's tokens it computes before it proposes, a long prompt piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.backends.device import as_float32
from furiosa_build.runtime.execution.communicator import DistributedCommunicator
from furiosa_build.runtime.execution.executor import Executor
from furiosa_build.runtime.execution.input_buffers import Row
from furiosa_build.runtime.execution.rank_threads import RankThreads
from furiosa_build.runtime.request import Request
from furiosa_build.runtime.sampling.sampler import propose
from furiosa_build.runtime.sampling.selection import Floats
from furiosa_build.runtime.scheduling.buckets import Buckets
from furiosa_build.runtime.scheduling.kv_cache import BlockManager

# Tokens that it may be behind and still proposes at once. After a step it has not run the last proposal, if that was
# accepted, and the token that followed it.
_CATCH_UP = 2


@dataclass
class _Progress:
    """How far the draft has got with a request: tokens that it has computed, and which of them were only proposed."""

    computed: int = 0
    known: int = 0
    proposed: list[int] = field(default_factory=list)

    def keep_accepted(self, tokens: Sequence[int]) -> None:
        """Drops the proposals that were rejected."""
        pairs = zip(self.proposed, tokens[self.known :], strict=False)
        accepted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self.computed = min(self.computed, self.known + accepted)
        self.known, self.proposed = len(tokens), []


class Drafter:
    """The draft model of one replica.

    Args:
        opened: The draft's part of an artifact. A request for which it has too few KV blocks gets no proposals.
        prefill_chunk_size: Most tokens of a prompt that run at once.
        enable_prefix_caching: Whether requests share the blocks of tokens that they begin with alike.
        like: The drafter of another replica, whose programs and mapped parameters this one uses as well.
        communicator: This process's end, when every rank is a process.
        threads: The threads of the replica's ranks; None: all is computed in the thread that calls.

    Raises:
        UserError: The artifact is inconsistent, or there is not enough memory.
    """

    def __init__(
        self,
        opened: OpenArtifact,
        *,
        prefill_chunk_size: int | None,
        enable_prefix_caching: bool,
        like: Drafter | None = None,
        communicator: DistributedCommunicator | None = None,
        threads: RankThreads | None = None,
    ) -> None:
        config = opened.artifact.generator_config
        self._blocks = BlockManager(config.paged_attention_num_blocks, config.paged_attention_block_size)
        self._buckets = Buckets(opened.artifact.pipelines, prefill_chunk_size)
        others = None if like is None else like._executor
        self._executor: Executor = Executor(opened, self._num_slots, others, communicator, threads)
        self._enable_prefix_caching = enable_prefix_caching
        self._progress: dict[str, _Progress] = {}

    def propose(self, wanted: Mapping[Request, int]) -> None:
        """Gives requests that decode up to so many proposals each; none where it is too far behind, or lacks KV blocks.

        After an error, which may be of any of them, no other request begins with what they have computed.
        """
        try:
            self._propose_all(wanted)
        except Exception:
            for request in wanted:
                if request.request_id in self._progress:
                    self._blocks.invalidate(request.request_id)
            raise

    def _propose_all(self, wanted: Mapping[Request, int]) -> None:
        numbers = {request: self._reserve(request, number) for request, number in wanted.items()}
        self._run_pieces([request for request, number in numbers.items() if number > 0])
        ready = {
            request: number
            for request, number in numbers.items()
            if number > 0 and len(request.tokens) - self._progress[request.request_id].computed <= _CATCH_UP
        }
        while unfinished := [request for request, number in ready.items() if len(request.proposals) < number]:
            for group in self._groups(unfinished):
                self._decode(group)

    def forget(self, request: Request) -> None:
        """Frees the blocks of a request that has ended."""
        if self._progress.pop(request.request_id, None) is not None:
            self._blocks.free(request.request_id)

    def recover(self) -> None:
        """Makes ready for more after a failure. What failed does not count as computed."""
        self._executor.recover()

    def check_integrity(self, requests: Iterable[str]) -> None:
        """Raises RuntimeError when the internal state is inconsistent, or blocks belong to others than `requests`."""
        self._blocks.check_integrity()
        if self._blocks.owners() != self._progress.keys() or not self._progress.keys() <= set(requests):
            raise RuntimeError(f"the draft has KV blocks of {self._blocks.owners()}")
        self._executor.check_integrity(self._num_slots)

    @property
    def _num_slots(self) -> int:
        return (self._blocks.num_blocks + 1) * self._blocks.block_size  # one block more: the scratch block

    def _reserve(self, request: Request, number: int) -> int:
        """Updates the progress of a request and reserves its blocks. Returns how many proposals these suffice for."""
        tokens, owner = request.tokens, request.request_id
        # The last proposal is not run.
        number = min(number, self._buckets.max_context - len(tokens) + 1)
        cached = [] if owner in self._progress or not self._enable_prefix_caching else self._find_cached(tokens)
        needed = len(tokens) + number - 1 - len(cached) * self._blocks.block_size
        free = self._blocks.num_free - self._blocks.num_evictable(cached)
        if number < 1 or self._blocks.missing(owner, needed) > free:
            return 0
        if owner not in self._progress:
            self._blocks.adopt(owner, cached)
            self._progress[owner] = _Progress(len(cached) * self._blocks.block_size)
        progress = self._progress[owner]
        progress.keep_accepted(tokens)
        if self._enable_prefix_caching:
            self._blocks.cache_full_blocks(owner, tokens, progress.computed)
        self._blocks.reserve(owner, len(tokens) + number - 1)
        return number

    def _find_cached(self, tokens: Sequence[int]) -> list[int]:
        return self._blocks.find_cached(tokens, len(tokens) - 1) if self._buckets.can_split(len(tokens) - 1) else []

    def _run_pieces(self, requests: Sequence[Request]) -> None:
        """Runs one piece of each request that the draft is far behind with; together, as far as a bucket takes them."""
        group: list[tuple[Request, int, int]] = []
        for request in requests:
            start, end = self._progress[request.request_id].computed, len(request.tokens) - 1
            if end - start < _CATCH_UP:
                continue
            piece = (request, start, self._buckets.next_piece(start, end))
            if group and self._for_pieces([*group, piece]) is None:
                self._run_together(group)
                group = []
            group.append(piece)
        if group:
            self._run_together(group)

    def _for_pieces(self, pieces: Sequence[tuple[Request, int, int]]) -> str | None:
        pipeline = self._buckets.for_prefill([start for _, start, _ in pieces], [count for _, _, count in pieces])
        return None if pipeline is None else pipeline.name

    def _run_together(self, pieces: Sequence[tuple[Request, int, int]]) -> None:
        pipeline = self._for_pieces(pieces)
        if pipeline is None:  # too long for what there is: these get no proposals
            return
        self._executor.run(pipeline, [self._row(request, start, count) for request, start, count in pieces])
        for request, _, count in pieces:
            self._progress[request.request_id].computed += count

    def _groups(self, requests: Sequence[Request]) -> Iterable[list[Request]]:
        """Groups of requests that can decode together."""
        group: list[Request] = []
        for request in requests:
            if group and self._for_decode([*group, request]) is None:
                yield group
                group = []
            group.append(request)
        yield group

    def _for_decode(self, requests: Sequence[Request]) -> str | None:
        most = max(self._progress[request.request_id].computed for request in requests)
        pipeline = self._buckets.for_rows(len(requests), most)
        return None if pipeline is None else pipeline.name

    def _decode(self, requests: Sequence[Request]) -> None:
        """Runs one more token of each: one of its tokens, or the last proposal."""
        pipeline = self._for_decode(requests)
        assert pipeline is not None, "no more is prepared than the largest context"
        rows = [self._row(request, self._progress[request.request_id].computed, 1) for request in requests]
        logits = self._executor.run(pipeline, rows).logits
        for request, row in zip(requests, logits, strict=False):  # there may be more rows: padding
            progress = self._progress[request.request_id]
            progress.computed += 1
            if progress.computed >= len(request.tokens):
                self._propose(request, as_float32(row[-1]))
                progress.proposed.append(request.proposals[-1].token)

    def _propose(self, request: Request, logits: Floats) -> None:
        """Proposes the next token. `logits` is float32 [vocab]."""
        params, proposed = request.params, [proposal.token for proposal in request.proposals]
        request.proposals.append(
            propose(
                logits,
                params,
                prompt=request.prompt_array,
                output=[*request.output_token_ids, *proposed],
                forbidden=request.forbidden_tokens(len(proposed)),
                generator=request.generator,
            )
        )

    def _row(self, request: Request, start: int, count: int) -> Row:
        return Row(request.next_tokens(start, count), start, self._blocks.slots(request.request_id))
