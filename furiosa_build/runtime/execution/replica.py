"""One copy of the model: its scheduler, its executor, and its batches under way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.artifact.schema import ParallelConfig
from furiosa_build.core import failpoints
from furiosa_build.core.errors import UserError
from furiosa_build.runtime.execution.communicator import DistributedCommunicator, PeerFailedError
from furiosa_build.runtime.execution.drafter import Drafter
from furiosa_build.runtime.execution.executor import Executor, num_elements
from furiosa_build.runtime.execution.input_buffers import Row
from furiosa_build.runtime.execution.rank import StepOutputs, device_of
from furiosa_build.runtime.execution.rank_threads import RankThreads
from furiosa_build.runtime.execution.thread_shares import ThreadShare, divide
from furiosa_build.runtime.request import Request
from furiosa_build.runtime.scheduling.batch import Batch
from furiosa_build.runtime.scheduling.kv_cache import BlockManager
from furiosa_build.runtime.scheduling.scheduler import Scheduler
from furiosa_build.runtime.stats import EngineStats


@dataclass
class Replica:
    """One copy of the model.

    Attributes:
        scheduler: Decides which requests run next.
        executor: Runs the model.
        drafter: Proposes tokens, if there is a draft model.
        threads: The threads in which both compute; None: the thread that takes the steps.
        queue_limit: Batches under way at a time, where the executor can have several.
        in_flight: The batches under way, the oldest first, and their outputs to be.
        proposals: The number of times that tokens were proposed to a request.
        proposed_tokens: The number of tokens proposed.
        accepted_tokens: The number of those that the model accepted.
    """

    scheduler: Scheduler
    executor: Executor
    drafter: Drafter | None
    threads: RankThreads | None
    queue_limit: int
    in_flight: deque[tuple[Batch, Future[StepOutputs]]] = field(default_factory=deque)
    proposals: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0

    def fill(self) -> None:
        """Submits what can run now, with what the draft model proposes."""
        limit = self.queue_limit if self.executor.is_concurrent else 1
        while len(self.in_flight) < limit and (batch := self.scheduler.schedule()) is not None:
            batch, drafting = self._with_proposals(batch)
            rows = []
            now = time.monotonic()
            for request, count in zip(batch.requests, batch.counts, strict=True):
                request.started_at = now if request.started_at is None else request.started_at
                start = request.num_computed
                proposed = [proposal.token for proposal in request.proposals]
                for sequence in batch.sequences(request):
                    slots = self.scheduler.blocks.slots(sequence)
                    rows.append(Row(sequence.tokens[start : start + count] + proposed, start, slots))
            self.in_flight.append((batch, drafting or self.executor.submit(batch.pipeline.name, rows)))

    def _with_proposals(self, batch: Batch) -> tuple[Batch, Future[StepOutputs] | None]:
        """The batch as it is to run; and its failed result, if the draft has failed."""
        if self.drafter is None or not (wanted := self.scheduler.wanted_proposals(batch)):
            return batch, None
        try:
            self.drafter.propose(wanted)
        except Exception as error:
            failed: Future[StepOutputs] = Future()
            failed.set_exception(error)
            return batch, failed
        return self.scheduler.with_proposals(batch), None

    def finish(self) -> tuple[Batch, StepOutputs]:
        """The oldest batch under way and its outputs. After an error it is still under way, until `recover`."""
        batch, outputs = self.in_flight[0]
        for request in batch.requests:
            with failpoints.doing(f"request:{request.request_id}"):
                failpoints.reach("step")
        result = outputs.result()
        self.in_flight.popleft()
        return batch, result

    def recover(self, error: Exception) -> dict[Request, Exception]:
        """Requeues all batches under way, after `error` from `finish`. Returns the requests that are to end, and why.

        Those of a batch that failed only because another did, or after it, run again.
        """
        self.executor.recover()
        if self.drafter is not None:
            self.drafter.recover()
        (batch, _), *later = self.in_flight
        self.in_flight.clear()
        culprit = batch
        if isinstance(error, PeerFailedError):
            for other, outputs in later:
                cause = outputs.exception()
                if isinstance(cause, Exception) and not isinstance(cause, PeerFailedError):
                    culprit, error = other, cause
                    break
        for request in culprit.requests:
            self.scheduler.invalidate_cache(request)
        for failed in (batch, *(other for other, _ in later)):
            self.scheduler.requeue(failed)
        return dict.fromkeys(culprit.requests, error)

    def stats(self) -> EngineStats:
        return replace(
            self.scheduler.stats(),
            proposals=self.proposals,
            proposed_tokens=self.proposed_tokens,
            accepted_tokens=self.accepted_tokens,
        )

    def close(self) -> None:
        """Ends the threads of stages and ranks."""
        if self.threads is not None:
            self.threads.close()

    def check_integrity(self) -> None:
        """Raises RuntimeError when scheduler, KV blocks and executor are inconsistent."""
        self.scheduler.check_integrity()
        blocks = self.scheduler.blocks
        self.executor.check_integrity((blocks.num_blocks + 1) * blocks.block_size)
        if self.drafter is not None:
            self.drafter.check_integrity(self.scheduler.request_ids)
        under_way = sorted(request.request_id for batch, _ in self.in_flight for request in batch.requests)
        in_flight = sorted(request.request_id for request in self.scheduler.in_flight)
        if under_way != in_flight:
            raise RuntimeError(f"batches of {under_way} are under way, in flight are {in_flight}")


def make_replica(
    opened: OpenArtifact,
    num_blocks: int,
    communicator: DistributedCommunicator | None,
    enable_prefix_caching: bool,
    shares: Sequence[ThreadShare],
    like: Replica | None,
) -> Replica:
    """A copy of an artifact's model, with its draft model if there is one.

    Args:
        opened: The artifact.
        num_blocks: KV blocks of a layer.
        communicator: When every rank is a process: this one's end.
        enable_prefix_caching: Whether requests share the KV blocks of equal beginnings.
        shares: What its elements compute with.
        like: Another one, whose programs and mapped parameters this one uses as well.

    Raises:
        UserError: As `Executor` does; or ranks are processes, and the draft is divided otherwise than the model.
    """
    config, draft = opened.artifact.generator_config, opened.draft
    block_size, defaults = config.paged_attention_block_size, config.default_scheduler_config
    if communicator is not None and draft is not None:
        _refuse_other_ranks(opened.artifact.parallel_config, draft.artifact.parallel_config)
    threads = _begin(opened, shares, communicator)
    try:
        executor = Executor(
            opened,
            (num_blocks + 1) * block_size,  # one more: the scratch block
            like.executor if like else None,
            communicator,
            threads,
        )
        drafter = None
        if draft is not None:
            drafter = Drafter(
                draft,
                prefill_chunk_size=defaults.prefill_chunk_size,
                enable_prefix_caching=enable_prefix_caching,
                like=like.drafter if like else None,
                communicator=communicator,
                threads=threads,
            )
    except BaseException:
        if threads is not None:
            threads.close()
        raise
    scheduler = Scheduler(
        opened.artifact.pipelines,
        BlockManager(num_blocks, block_size),
        spare_blocks_ratio=defaults.spare_blocks_ratio,
        prefill_chunk_size=defaults.prefill_chunk_size,
        is_offline=defaults.is_offline,
        num_stages=executor.num_stages if executor.is_concurrent else 1,
        enable_prefix_caching=enable_prefix_caching,
        num_speculative_tokens=(config.num_speculative_tokens or 0) if draft else 0,
    )
    return Replica(scheduler, executor, drafter, threads, defaults.npu_queue_limit)


def _refuse_other_ranks(model: ParallelConfig, draft: ParallelConfig) -> None:
    ranks, stages = draft.tensor_parallel_size, draft.pipeline_parallel_size
    if (ranks, stages) != (model.tensor_parallel_size, model.pipeline_parallel_size):
        raise UserError(
            f"with a process for each rank, the draft model's {ranks} ranks x {stages} stages cannot run beside the "
            f"model's {model.tensor_parallel_size} ranks x {model.pipeline_parallel_size} stages",
            where="communicator",
            valid="a draft model of as many ranks and stages",
            hint="run ranks as threads, or set use_speculative_decoding_if_possible=False",
        )


def _begin(
    opened: OpenArtifact, shares: Sequence[ThreadShare], communicator: DistributedCommunicator | None
) -> RankThreads | None:
    """Threads for the ranks of the model and of its draft; None: the calling thread computes, with its own share."""
    device = device_of(opened)
    if communicator is None and len(shares) * opened.artifact.parallel_config.data_parallel_size > 1:
        return RankThreads(device, shares)
    ranks = opened.artifact.parallel_config.tensor_parallel_size
    number = 0 if communicator is None else communicator.stage * ranks + communicator.rank
    shares[number].begin(device)
    return None


def thread_shares(
    opened: OpenArtifact, num_threads: int | None, pinned: bool, communicator: DistributedCommunicator | None
) -> list[list[ThreadShare]]:
    """For each replica what its elements compute with, as `divide` has it. The draft's elements are the model's.

    What computes in the thread that steps the engine keeps what that has, where nothing is asked for.
    """
    replicas = opened.artifact.parallel_config.data_parallel_size
    elements = max(
        num_elements(model.artifact.parallel_config) for model in (opened, opened.draft) if model is not None
    )
    is_one_thread = communicator is not None or elements * replicas == 1
    if is_one_thread and num_threads is None and not pinned:
        return [[ThreadShare()] * elements] * replicas
    device = device_of(opened)
    shares = divide(device, elements * replicas, num_threads, pinned)
    return [shares[i * elements : (i + 1) * elements] for i in range(replicas)]
