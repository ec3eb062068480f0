"""What a build prints: one line a step that ran, an overall progress bar on a terminal, the result at the end."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TextIO

from doit.reporter import ConsoleReporter

from furiosa_build.errors import BuildError, StepError
from furiosa_build.show import result_text

if TYPE_CHECKING:
    from rich.progress import Progress

    from furiosa_build.build import Build


class BuildReporter(ConsoleReporter):  # type: ignore[misc]
    """doit's reporter. doit makes the instance, so what is to be reported on is set on the class."""

    desc = "the steps of a furiosa build"
    build: ClassVar[Build]
    errors: ClassVar[list[BuildError]] = []

    def __init__(self, outstream: TextIO, options: Any) -> None:
        super().__init__(outstream, options)
        self._begin = time.monotonic()
        self._started: set[str] = set()
        self._total = self._ran = self._up_to_date = 0
        self._lock = threading.Lock()  # doit calls from the threads that run the steps
        self._ended = False
        self._interrupted_by: int | None = None
        self._handlers: dict[int, Any] = {}
        self._bar: Progress | None = None
        self._bar_task: Any = None

    def initialize(self, tasks: dict[str, Any], selected_tasks: list[str]) -> None:
        """Counts the steps that this run may come to."""
        pending, reached = list(selected_tasks), set()
        while pending:
            name = pending.pop()
            if name not in reached:
                reached.add(name)
                pending.extend(tasks[name].task_dep)
        self._total = sum(1 for name in reached if tasks[name].actions)
        try:
            self.build.check_toolchain()
        except BuildError as error:
            self._end_with([error])
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._interrupt)

    def execute_task(self, task: Any) -> None:
        """A step begins."""
        if not task.actions:
            return
        with self._lock:
            self._started.add(task.name)
            self._show_progress()

    def add_success(self, task: Any) -> None:
        """A step has ended well."""
        if not task.actions:
            return
        done = self.build.done[task.name]
        with self._lock:
            self._started.remove(task.name)
            if done.ran:
                self._ran += 1
                took = f"{done.record.seconds:7.1f} s"
            else:
                self._up_to_date += 1
                took = "  found in the store" + (", published again" if task.name in ("package", "qualify") else "")
            count = f"[{self._ran + self._up_to_date:{len(str(self._total))}}/{self._total}]"
            self._print(f"{count} {task.name:36} {took}")
            self._show_progress()

    def skip_uptodate(self, task: Any) -> None:
        """A step had nothing to do."""
        if task.actions:
            with self._lock:
                self._up_to_date += 1

    def add_failure(self, task: Any, fail: Any) -> None:
        """A step has failed; what is not one of our own errors is doit's to tell."""
        if fail.report:
            super().add_failure(task, fail)

    def complete_run(self) -> None:
        """Ends the run, with the exit status of the first error if there was one."""
        if self._ended:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._bar is not None:
            self._bar.stop()
        self.build.close()
        errors = list(self.errors)
        self.errors.clear()
        if errors or self._interrupted_by is not None:
            self._print(f"{_steps(self._ran)} ran, kept in the store; the next build goes on from there")
        if self._interrupted_by is not None:
            print(f"interrupted by {signal.Signals(self._interrupted_by).name}", file=sys.stderr)
            sys.exit(128 + self._interrupted_by)
        if errors:
            self._end_with(errors)
        super().complete_run()
        if not self.failures and not self.runtime_errors and "qualify" in self.build.done:
            self._print(result_text(self.build))
        seconds = time.monotonic() - self._begin
        self._print(f"ran {self._ran} of {self._total} steps in {seconds:.1f} s, {self._up_to_date} up to date")
        if self.failures or self.runtime_errors:
            # An error of this program; doit's own status for it is that of bad input.
            sys.exit(StepError.exit_status)

    def _interrupt(self, number: int, frame: Any) -> None:
        del frame
        self._interrupted_by = number
        self.build.interrupt()

    def _end_with(self, errors: Sequence[BuildError]) -> NoReturn:
        self._ended = True
        self.build.close()
        for error in errors:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(errors[0].exit_status)

    def _print(self, line: str) -> None:
        if self._bar is not None and self._bar.live.is_started:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            self.write(line + "\n")
            self.outstream.flush()

    def _show_progress(self) -> None:
        if not self.outstream.isatty():
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=Console(file=self.outstream),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar_task = self._bar.add_task("", total=self._total)
            self._bar.start()
        running = ", ".join(sorted(self._started))
        self._bar.update(self._bar_task, completed=self._ran + self._up_to_date, description=running[:60])


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
