"""Runs the pipelines of an artifact: one replica, with all its stages and ranks.

Every rank of every stage is a thread of its own. The programs release the interpreter while they compute, and a stage
works on one batch while the next stage works on the one before. With one rank and one stage there is no thread.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.backends.base import LoadedProgram
from furiosa_build.runtime.execution.communicator import (
    Communicator,
    DistributedCommunicator,
    LocalCommunicator,
    local_communicators,
)
from furiosa_build.runtime.execution.rank import RankRunner, Row, load_programs

_Job = tuple[str, Sequence[Row], "Future[Tensor]"]
"""Pipeline, rows, and where the logits go."""


class Executor:
    """One replica.

    Args:
        opened: The artifact.
        num_slots: Slots of each layer's KV caches.
        like: Another replica, whose programs and mapped parameters this one uses as well.
        communicator: When every rank is a process: this one's end. Then all call `submit` with the same batches, and
            all are given the logits.
        num_replicas: That run side by side, and share the processor's cores.

    Raises:
        UserError: The artifact is inconsistent, or there is not enough memory.
    """

    def __init__(
        self,
        opened: OpenArtifact,
        num_slots: int,
        like: Executor | None = None,
        communicator: DistributedCommunicator | None = None,
        num_replicas: int = 1,
    ) -> None:
        self._programs: Mapping[str, LoadedProgram] = load_programs(opened) if like is None else like._programs
        parallel = opened.artifact.parallel_config
        self.num_stages, ranks = parallel.pipeline_parallel_size, parallel.tensor_parallel_size
        self._distributed = communicator
        ends: Sequence[Communicator] = (
            local_communicators(self.num_stages, ranks) if communicator is None else [communicator]
        )
        mapped = [None] * len(ends) if like is None else [runner.parameters for runner in like._runners]
        makers = [
            partial(RankRunner, opened, num_slots, self._programs, end, own)
            for end, own in zip(ends, mapped, strict=True)
        ]
        self._threads: list[_RankThread] = []
        # The threads know the runners and not this object: they end with it, also where nobody closes it.
        self._end = weakref.finalize(self, _end, self._threads)
        if communicator is None and len(ends) * num_replicas > 1:
            each = max(1, torch.get_num_threads() // (len(ends) * num_replicas))
            last = self.num_stages - 1
            for make, end in zip(makers, ends, strict=True):
                assert isinstance(end, LocalCommunicator)
                self._threads.append(_RankThread(make, end, each, (end.stage, end.rank) == (last, 0)))
        self._runners: list[RankRunner] = []
        try:
            self._runners += [thread.runner.result() for thread in self._threads] or [make() for make in makers]
        except BaseException:
            self._end()
            raise

    @property
    def is_concurrent(self) -> bool:
        """Whether `submit` returns before the batch has run."""
        return bool(self._threads)

    def submit(self, pipeline: str, rows: Sequence[Row]) -> Future[Tensor]:
        """Runs one bucket, after those that were submitted before. The result is `RankRunner.run`'s.

        When it fails, those submitted after it may fail with PeerFailedError or give wrong results, until `recover`.
        """
        future: Future[Tensor] = Future()
        for thread in self._threads:
            thread.jobs.put((pipeline, rows, future))
        if not self._threads:
            try:
                future.set_result(self._run_here(pipeline, rows))
            except Exception as error:
                future.set_exception(error)
        return future

    def _run_here(self, pipeline: str, rows: Sequence[Row]) -> Tensor:
        [runner] = self._runners
        logits = runner.run(pipeline, rows)
        if self._distributed is not None:
            empty = torch.empty_like(runner.logits_of(pipeline)) if logits is None else logits.contiguous()
            logits = self._distributed.broadcast_from_last(empty)
        assert logits is not None
        return logits

    def run(self, pipeline: str, rows: Sequence[Row]) -> Tensor:
        """Runs one bucket and waits for its logits."""
        return self.submit(pipeline, rows).result()

    def recover(self) -> None:
        """After a failure: waits until all that was submitted has ended, and makes ready for more.

        Raises:
            RuntimeError: Ranks are processes, of which the others still wait for this one.
        """
        if self._distributed is not None:
            raise RuntimeError("a rank has failed, and the processes of the others cannot go on")
        idle = [threading.Event() for _ in self._threads]
        for thread, event in zip(self._threads, idle, strict=True):
            thread.jobs.put(event)
        for event in idle:
            event.wait()
        for thread in self._threads:
            thread.end.reset()

    def check_integrity(self, num_slots: int) -> None:
        """Raises RuntimeError when a rank has not KV caches of `num_slots` slots, or its thread has ended."""
        for runner in self._runners:
            if runner.num_slots != num_slots:
                raise RuntimeError(f"rank {runner.rank} has {runner.num_slots} KV slots, {num_slots} are handed out")
        for thread in self._threads:
            if not thread.is_alive():
                raise RuntimeError(f"the thread of {thread.name} has ended")

    def close(self) -> None:
        """Ends the threads."""
        self._end()
        self._threads = []


def _end(threads: Sequence[_RankThread]) -> None:
    """Ends the threads, and waits: one that computes while the interpreter ends would abort the process."""
    for thread in threads:
        thread.jobs.put(None)
    if isinstance(threading.current_thread(), _RankThread):
        return  # The executor was garbage, found in a rank's thread: that rank may be the one the others wait for.
    for thread in threads:
        thread.join()


class _RankThread(threading.Thread):
    """Makes one rank, and runs its jobs in order; `speaks`: it is the one whose logits count.

    The rank is made here, so that its KV caches are in memory near the cores that use them, and so that no other thread
    has a team of OpenMP: with more threads in teams than cores, they wait for each other the slow way.
    """

    def __init__(self, make: Callable[[], RankRunner], end: LocalCommunicator, threads: int, speaks: bool) -> None:
        super().__init__(name=f"stage {end.stage}, rank {end.rank}", daemon=True)
        self.jobs: queue.SimpleQueue[_Job | threading.Event | None] = queue.SimpleQueue()
        self.end = end
        self.runner: Future[RankRunner] = Future()
        self._make, self._number, self._speaks = make, threads, speaks
        self.start()

    def run(self) -> None:
        """Until `None` comes. An event is set when all before it has ended."""
        torch.set_num_threads(self._number)  # of this thread's parallel regions
        try:
            runner = self._make()
        except BaseException as error:
            self.runner.set_exception(error)
            return
        self.runner.set_result(runner)
        while (job := self.jobs.get()) is not None:
            if isinstance(job, threading.Event):
                job.set()
                continue
            pipeline, rows, future = job
            try:
                logits = runner.run(pipeline, rows)
                if self._speaks:
                    assert logits is not None
                    future.set_result(logits)
            except Exception as error:
                with suppress(Exception):  # another rank was first to fail
                    future.set_exception(error)
                self.end.abort()
