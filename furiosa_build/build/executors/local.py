"""Worker processes for the steps that need torch. They live on between steps: importing torch costs seconds.

The build's own process never imports torch. What a step prints, and what compilers print, goes to the step's log.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.build.executors.base import Executor, FindInputs
from furiosa_build.build.executors.in_process import InProcess, run_here
from furiosa_build.build.executors.spawning import Spawn, begin_worker, track_quietly
from furiosa_build.core.errors import StepError, UserError
from furiosa_build.core.failpoints import doing
from furiosa_build.core.peak_memory import give_back
from furiosa_build.core.progress import current, metered
from furiosa_build.recipe.schema import BuildOptions
from furiosa_build.steps.base import Inputs, Job, Request
from furiosa_build.store import ActionResult

if TYPE_CHECKING:
    from concurrent.futures import ProcessPoolExecutor


def local_executors(options: BuildOptions, find: FindInputs) -> dict[str, Executor]:
    """What runs the steps of a build on this machine, by what steps call their `worker`."""
    return {
        "here": InProcess(find),
        "builder": WorkerPool(options.num_pipeline_builder_workers, find),
        "compiler": WorkerPool(options.num_compile_workers, find),
    }


@dataclass
class _Processes:
    """At most so many processes; none is started before it is needed."""

    number: int
    executor: ProcessPoolExecutor | None = None
    starting: threading.Lock = field(default_factory=threading.Lock)
    killed: bool = False


class WorkerPool:
    """Runs steps in worker processes.

    Args:
        workers: At most so many processes; none is started before it is needed.
        find: Finds the inputs of a request.
    """

    def __init__(self, workers: int, find: FindInputs) -> None:
        self._processes, self._find = _Processes(workers), find

    @property
    def workers(self) -> int:
        """How many processes there may be. May be changed before the first step runs."""
        return self._processes.number

    @workers.setter
    def workers(self, number: int) -> None:
        self._processes.number = number

    def beside(self, find: FindInputs) -> WorkerPool:
        """Runs the steps of another build in the same processes. `find`: finds the inputs of its requests."""
        other = WorkerPool(self.workers, find)
        other._processes = self._processes
        return other

    def run(self, name: str, job: Job[Any], request: Request, output: Path, log: Path) -> ActionResult:
        """Runs a step, which is called `name`, in a worker and waits. The log is kept when the step fails.

        Raises UserError as the step raised it, StepError for anything else that goes wrong.
        """
        from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

        inputs, processes = self._find(request), self._processes
        with processes.starting:
            if processes.killed:
                raise StepError(name, "the build was interrupted")
            if processes.executor is None:
                track_quietly()
                processes.executor = ProcessPoolExecutor(processes.number, Spawn(), initializer=begin_worker)
            executor = processes.executor
        meter = current()
        counted = None if meter is None else meter.path
        try:
            future = executor.submit(_work, name, job, request, inputs, output, log, counted)
            _watch(executor)
            outcome, value = future.result()
        except BrokenProcessPool as error:
            with processes.starting:
                executor.shutdown()  # its futures fail before its other workers have ended
                if processes.executor is executor:  # another step may have begun a new one meanwhile
                    processes.executor = None
            cause = "the build was interrupted" if processes.killed else "its process was killed (out of memory?)"
            raise StepError(name, cause, str(log)) from error
        if outcome != "failed":
            log.unlink(missing_ok=True)
        if outcome == "user error":
            raise UserError(**value)
        if outcome == "failed":
            raise StepError(name, value, str(log))
        return value  # type: ignore[no-any-return]

    def kill(self) -> None:
        """Ends the workers at once, with the compilers they have started; steps that run fail. For signal handlers."""
        self._processes.killed = True
        executor = self._processes.executor
        running = {} if executor is None else executor._processes or {}
        for process in list(running.values()):
            try:
                if process.pid is not None:
                    os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # not a group of its own yet, or gone
                process.kill()

    def close(self) -> None:
        """Ends the workers."""
        if self._processes.executor is not None:
            self._processes.executor.shutdown(cancel_futures=True)
            self._processes.executor = None


def _watch(executor: ProcessPoolExecutor) -> None:
    """Has the thread that watches the workers look at all of them.

    `submit` starts a worker after it has woken that thread, which then may wait without an eye on the new one: if that
    is killed, nobody notices before another worker is done.
    """
    with executor._shutdown_lock:
        wakeup = executor._executor_manager_thread_wakeup
        if wakeup is not None:
            wakeup.wakeup()


def _work(
    name: str, job: Job[Any], request: Request, inputs: Inputs, output: Path, log: Path, counted: Path | None
) -> tuple[str, Any]:
    with _output_to(log), doing(name), metered(counted):
        try:
            return "done", run_here(job, request, inputs, output)
        except UserError as error:
            return "user error", {
                "what": error.what,
                "where": error.where,
                "valid": error.valid,
                "hint": error.hint,
            }
        except StepError as error:
            return "failed", error.cause
        except Exception as error:
            traceback.print_exc()
            first_line = (str(error).strip().splitlines() or [""])[0]
            return "failed", f"{type(error).__name__}: {first_line}"
        finally:
            give_back()


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Sends what this process and its children write to stdout and stderr to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, target in zip(saved, (1, 2), strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
