"""Runs the pipelines of an artifact: one model of a replica, with all its stages and ranks.

Every rank of every stage has a thread. The programs release the interpreter while they compute, and a stage
works on one batch while the next stage works on the one before. With one rank and one stage there is no thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.artifact.schema import ParallelConfig
from furiosa_build.backends.base import LoadedProgram
from furiosa_build.runtime.execution.communicator import (
    Communicator,
    DistributedCommunicator,
    LocalCommunicator,
    local_communicators,
)
from furiosa_build.runtime.execution.input_buffers import Row
from furiosa_build.runtime.execution.rank import ProgramKey, RankRunner, StepOutputs, load_programs
from furiosa_build.runtime.execution.rank_threads import RankThread, RankThreads


class Executor:
    """One copy of a model.

    Args:
        opened: The artifact.
        num_slots: Slots of each layer's KV caches.
        like: The executor of another replica, whose programs and mapped parameters this one uses as well.
        communicator: This process's end, when every rank is a process. Then all call `submit` with the same batches,
            and all are given the outputs.
        threads: Threads for the ranks, one for each of them at least; without any, the one rank computes in the
            thread that calls.

    Raises:
        UserError: The artifact is inconsistent, or there is not enough memory.
    """

    def __init__(
        self,
        opened: OpenArtifact,
        num_slots: int,
        like: Executor | None = None,
        communicator: DistributedCommunicator | None = None,
        threads: RankThreads | None = None,
    ) -> None:
        self._programs: Mapping[ProgramKey, LoadedProgram] = load_programs(opened) if like is None else like._programs
        parallel = opened.artifact.parallel_config
        self.num_stages, ranks = parallel.pipeline_parallel_size, parallel.tensor_parallel_size
        self._distributed = communicator
        self._ends = local_communicators(self.num_stages, ranks) if communicator is None else []
        ends: Sequence[Communicator] = self._ends if communicator is None else [communicator]
        mapped = [None] * len(ends) if like is None else [runner.parameters for runner in like._runners]
        makers = [
            partial(RankRunner, opened, num_slots, self._programs, end, own)
            for end, own in zip(ends, mapped, strict=True)
        ]
        self._owner = threads  # keeps the threads alive
        self._threads: list[RankThread] = [] if threads is None else threads.threads[: len(ends)]
        # A rank is made in its thread, so that its KV caches are in memory near the cores that use them, and so that no
        # other thread has a team of OpenMP.
        if self._threads:
            futures = [thread.call(make) for thread, make in zip(self._threads, makers, strict=True)]
            self._runners: list[RankRunner] = [future.result() for future in futures]
        else:
            self._runners = [make() for make in makers]

    @property
    def is_concurrent(self) -> bool:
        """Whether `submit` returns before the batch has run."""
        return bool(self._threads)

    def submit(self, pipeline: str, rows: Sequence[Row]) -> Future[StepOutputs]:
        """Runs one bucket, after those that were submitted before. The result is `RankRunner.run`'s.

        When it fails, those submitted after it may fail with PeerFailedError or give wrong results, until `recover`.
        """
        future: Future[StepOutputs] = Future()
        if self._threads:
            last = self.num_stages - 1
            for thread, runner, end in zip(self._threads, self._runners, self._ends, strict=True):
                is_given = (end.stage, end.rank) == (last, 0)
                thread.put(partial(_run_rank, runner, end, pipeline, rows, future, is_given))
            return future
        try:
            future.set_result(self._run_here(pipeline, rows))
        except Exception as error:
            future.set_exception(error)
        return future

    def _run_here(self, pipeline: str, rows: Sequence[Row]) -> StepOutputs:
        [runner] = self._runners
        outputs = runner.run(pipeline, rows)
        if self._distributed is None:
            assert outputs is not None
            return outputs
        like = runner.outputs_of(pipeline)
        given = [
            None if empty is None else self._distributed.broadcast_from_last(empty if own is None else own)
            for empty, own in zip(like, outputs or (None, None), strict=True)
        ]
        assert given[0] is not None
        return StepOutputs(given[0], given[1])

    def run(self, pipeline: str, rows: Sequence[Row]) -> StepOutputs:
        """Runs one bucket and waits for what it gives."""
        return self.submit(pipeline, rows).result()

    def recover(self) -> None:
        """Makes ready for more after a failure, when all that was submitted has ended.

        Raises:
            RuntimeError: Ranks are processes, of which the others still wait for this one.
        """
        if self._distributed is not None:
            raise RuntimeError("a rank has failed, and the processes of the others cannot go on")
        for idle in [thread.call(_nothing) for thread in self._threads]:
            idle.result()
        for end in self._ends:
            end.reset()

    def check_integrity(self, num_slots: int) -> None:
        """Raises RuntimeError when a rank does not have KV caches of `num_slots` slots, or its thread has ended."""
        for runner in self._runners:
            if runner.num_slots != num_slots:
                raise RuntimeError(f"rank {runner.rank} has {runner.num_slots} KV slots, {num_slots} are handed out")
        for thread in self._threads:
            if not thread.is_alive():
                raise RuntimeError(f"the thread of {thread.name} has ended")


def num_elements(parallel: ParallelConfig) -> int:
    """The number of ranks in all stages of one copy of a model."""
    return parallel.tensor_parallel_size * parallel.pipeline_parallel_size


def _run_rank(
    runner: RankRunner,
    end: LocalCommunicator,
    pipeline: str,
    rows: Sequence[Row],
    future: Future[StepOutputs],
    is_given: bool,
) -> None:
    """Runs one rank's part of a bucket, in its thread. What one of all ranks returns is given."""
    try:
        outputs = runner.run(pipeline, rows)
        if is_given:
            assert outputs is not None
            future.set_result(outputs)
    except Exception as error:
        with suppress(Exception):  # another rank was first to fail
            future.set_exception(error)
        end.abort()


def _nothing() -> None:
    """Does nothing: its result says that all calls before it have returned."""
