"""doit's reporter, as an adapter: what doit reports of its tasks becomes events of the build's steps."""

from __future__ import annotations

import signal
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from furiosa_build.core.errors import BuildError, BuildInterrupted, StepError
from furiosa_build.core.events import (
    ArtifactReady,
    BuildFinished,
    BuildStarted,
    ErrorOccurred,
    Event,
    Interrupted,
    StepFinished,
    StepStarted,
    StepState,
)
from furiosa_build.core.text import steps_text

if TYPE_CHECKING:
    from furiosa_build.build.runnable import Runnable


class EventReporter:
    """Emits the events of one run of a build's tasks, and knows how the run ended.

    Args:
        build: The build whose steps are doit's tasks.
        signals: The signals that end the run early besides Ctrl-C, if it is in the main thread.

    Attributes:
        status: The exit status that the run stands for, once it is complete.
    """

    def __init__(self, build: Runnable, signals: Sequence[int] = ()) -> None:
        self._build = build
        self._signals = (signal.SIGINT, *signals)
        self._handlers: dict[int, Any] = {}
        self._interrupted_by: int | None = None
        self._failures: list[tuple[BuildError, str, str]] = []
        self._begin = time.monotonic()
        self._steps: list[str] = []
        self._has_started = False
        self._ran = self._up_to_date = self._told = 0

    @property
    def status(self) -> int:
        if self._interrupted_by is not None:
            return 128 + self._interrupted_by
        return self._failures[0][0].exit_status if self._failures else 0

    def fail(self, step: str, error: Exception) -> None:
        """Notes that a step failed. What is neither an error for people nor the system's is a bug, with a traceback."""
        if isinstance(error, BuildError):
            self._failures.append((error, self._build.place_of(step), ""))
        else:
            failed = StepError(step, f"{type(error).__name__}: {error}")
            failed.__cause__ = error
            trace = "" if isinstance(error, OSError) else "".join(traceback.format_exception(error))
            self._failures.append((failed, self._build.place_of(step), trace))
        if self._build.goes_on:
            self._tell(*self._failures[-1])

    def raise_failure(self) -> None:
        """Raises what ended a complete run: BuildInterrupted, or the first error."""
        if self._interrupted_by is not None:
            raise BuildInterrupted(self._interrupted_by)
        if self._failures:
            raise self._failures[0][0]

    # What doit calls.

    def initialize(self, tasks: dict[str, Any], selected_tasks: list[str]) -> None:
        """The run starts. Raises the BuildError with which the build is refused."""
        reached = _reached(tasks, selected_tasks)
        self._steps = [name for name in self._build.steps if name in reached]
        try:
            notes = self._build.begin(self._steps)
        except BuildError as error:
            self._failures.append((error, "", ""))
            raise
        self._emit(self._started())
        self._has_started = True
        for note in notes:
            self._build.events.note(note)
        for number in self._signals if threading.current_thread() is threading.main_thread() else ():
            self._handlers[number] = signal.signal(number, self._interrupt)

    def execute_task(self, task: Any) -> None:
        """A task starts. Called from the threads that run the tasks."""
        if task.name in self._steps:
            self._emit(StepStarted(step=task.name, progress_file=self._build.store.meter_path(task.name)))

    def add_success(self, task: Any) -> None:
        """A task has done its work."""
        if task.name in self._steps:
            ran = self._build.outcomes[task.name].ran
            self._finish(task.name, "ran" if ran else "reused")

    def skip_uptodate(self, task: Any) -> None:
        """A task has nothing to do."""
        if task.name in self._steps:
            self._finish(task.name, "up to date")

    def complete_run(self) -> None:
        """The run is over, however it ended."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        is_built = self.status == 0 and set(self._build.goals) <= set(self._steps)
        artifact = self._build.result() if is_built else None
        self._build.close()
        if self._has_started and self.status:
            kept = f"{steps_text(self._ran)} ran, kept in the store; the next build goes on from there"
            self._build.events.note(kept)
        if self._interrupted_by is not None:
            self._emit(Interrupted(signal=signal.Signals(self._interrupted_by).name))
        else:
            for failure in self._failures[self._told :]:
                self._tell(*failure)
        if artifact is not None:
            self._emit(ArtifactReady(directory=artifact, ran=self._ran))
        self._emit(
            BuildFinished(
                status=self.status,
                ran=self._ran,
                up_to_date=self._up_to_date,
                seconds=time.monotonic() - self._begin,
                artifact=artifact,
            )
        )

    def get_status(self, task: Any) -> None:
        """A task is looked at."""

    def add_failure(self, task: Any, fail: Any) -> None:
        """A task has failed: `fail` has been called."""

    def runtime_error(self, message: str) -> None:
        """A task could not be looked at: `fail` has been called."""

    def skip_ignore(self, task: Any) -> None:
        """Never called: no task is ignored."""

    def teardown_task(self, task: Any) -> None:
        """Never called: no task has a teardown."""

    def cleanup_error(self, error: Any) -> None:
        """Never called: no task has a teardown."""

    def _started(self) -> BuildStarted:
        build = self._build
        return BuildStarted(
            recipe=build.name,
            steps=tuple(self._steps),
            expected={name: build.estimate_seconds(name) for name in self._steps if not build.is_done(name)},
            compile_workers=build.options.num_compile_workers,
        )

    def _finish(self, step: str, state: StepState) -> None:
        if state == "ran":
            self._ran += 1
        else:
            self._up_to_date += 1
        record = self._build.outcomes[step].record
        self._emit(
            StepFinished(
                step=step,
                state=state,
                seconds=record.seconds,
                peak_memory=record.peak_memory,
                peak_mapped=record.peak_mapped,
                size=sum(output.size for output in record.outputs.values()),
                key=record.key,
            )
        )

    def _tell(self, error: BuildError, place: str, trace: str) -> None:
        self._told += 1
        self._emit(ErrorOccurred(message=f"{place}{error}", status=error.exit_status, traceback=trace))

    def _emit(self, event: Event) -> None:
        self._build.events.emit(event)

    def _interrupt(self, number: int, frame: Any) -> None:
        del frame
        self._interrupted_by = number
        self._build.interrupt()


def _reached(tasks: dict[str, Any], selected: Iterable[str]) -> set[str]:
    """The selected tasks and all that they need."""
    pending, reached = list(selected), set()
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending.extend(tasks[name].task_dep)
    return reached
