"""What a build prints: one line a step that ran, an overall progress bar on a terminal, the result at the end."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TextIO

from doit.reporter import ConsoleReporter

from furiosa_build.core.errors import BuildError, StepError
from furiosa_build.core.text import memory_text
from furiosa_build.ui.describe import result_text, short_path
from furiosa_build.ui.report import Record, step_data, write_report

if TYPE_CHECKING:
    from furiosa_build.build.build import Build
    from furiosa_build.ui.display import Display


class BuildReporter(ConsoleReporter):  # type: ignore[misc]
    """doit's reporter. doit makes the instance, so what is to be reported on is set on the class."""

    desc = "the steps of a furiosa build"
    build: ClassVar[Build]
    errors: ClassVar[list[BuildError]] = []
    as_json: ClassVar[bool] = False
    """One event a line, in place of text."""

    def __init__(self, outstream: TextIO, options: Any) -> None:
        super().__init__(outstream, options)
        self._begin = time.monotonic()
        self._record = Record()
        self._steps: list[str] = []
        self._total = self._ran = self._up_to_date = 0
        self._lock = threading.Lock()  # doit calls from the threads that run the steps
        self._ended = False
        self._interrupted_by: int | None = None
        self._handlers: dict[int, Any] = {}
        self._display: Display | None = None

    def write(self, text: str) -> None:
        """What doit itself says: of errors of this program. Not among events."""
        (sys.stderr if self.as_json else self.outstream).write(text)

    def initialize(self, tasks: dict[str, Any], selected_tasks: list[str]) -> None:
        """Counts the steps that this run may come to."""
        self.build.store.tell = self._tell
        pending, reached = list(selected_tasks), set()
        while pending:
            name = pending.pop()
            if name not in reached:
                reached.add(name)
                pending.extend(tasks[name].task_dep)
        self._total = sum(1 for name in reached if name in self.build.plan.steps)
        try:
            notes = self.build.begin([name for name in self.build.plan.steps if name in reached])
        except BuildError as error:
            self._end_with([error])
        steps = [name for name in self.build.plan.steps if name in reached]
        self._emit("build-begun", recipe=self.build.spec.name, steps=steps)
        for note in notes:
            self._tell(note)
        self._steps = steps
        for number in (signal.SIGINT, signal.SIGTERM) if _in_main_thread() else ():
            self._handlers[number] = signal.signal(number, self._interrupt)

    def execute_task(self, task: Any) -> None:
        """A step begins."""
        if task.name not in self.build.plan.steps:
            return
        with self._lock:
            self._record.begins(task.name)
            self._emit("step-begun", step=task.name)
            if self._display is None and self.outstream.isatty() and not self.as_json:
                self._display = self._begin_display()
            if self._display is not None:
                self._display.begins(task.name)

    def add_success(self, task: Any) -> None:
        """A step has ended well."""
        if task.name not in self.build.plan.steps:
            return
        done = self.build.done[task.name]
        with self._lock:
            self._record.ends(task.name, "ran" if done.ran else "reused")
            self._emit("step-ended", **step_data(self.build, self._record.steps[task.name]))
            if done.ran:
                self._ran += 1
                took = f"{done.record.seconds:7.1f} s  {memory_text(done.record.peak_memory):>8}"
            else:
                self._up_to_date += 1
                took = "  found in the store" + (", published again" if task.name in ("package", "qualify") else "")
            count = f"[{self._ran + self._up_to_date:{len(str(self._total))}}/{self._total}]"
            if not self.as_json:
                self._print(f"{count} {task.name:36} {took}")
            if self._display is not None:
                self._display.ends(task.name, self._ran + self._up_to_date)

    def skip_uptodate(self, task: Any) -> None:
        """A step had nothing to do."""
        if task.actions:
            with self._lock:
                self._up_to_date += 1
                self._record.ends(task.name, "up to date")

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
        if self._display is not None:
            self._display.stop()
        self.build.close()
        errors = list(self.errors)
        self.errors.clear()
        if errors or self._interrupted_by is not None:
            self._tell(f"{_steps(self._ran)} ran, kept in the store; the next build goes on from there")
        if self._interrupted_by is not None:
            self._emit("build-ended", status=128 + self._interrupted_by)
            print(f"interrupted by {signal.Signals(self._interrupted_by).name}", file=sys.stderr)
            sys.exit(128 + self._interrupted_by)
        if errors:
            self._end_with(errors)
        super().complete_run()
        failed = bool(self.failures or self.runtime_errors)
        built = not failed and "qualify" in self.build.done
        if built and not self.as_json:
            self._print(result_text(self.build))
        if built and self._ran:
            report = write_report(self.build, self._record)
            self._tell(f"report     {short_path(report)}")
        seconds = time.monotonic() - self._begin
        # An error of this program; doit's own status for it is that of bad input.
        status = StepError.exit_status if failed else 0
        artifact = {"artifact": str(self.build.version_directory)} if built else {}
        self._emit(
            "build-ended", status=status, ran=self._ran, up_to_date=self._up_to_date, seconds=seconds, **artifact
        )
        if self._total and not self.as_json:
            self._print(f"ran {self._ran} of {self._total} steps in {seconds:.1f} s, {self._up_to_date} up to date")
        if failed:
            sys.exit(status)

    def _interrupt(self, number: int, frame: Any) -> None:
        del frame
        self._interrupted_by = number
        self.build.interrupt()

    def _end_with(self, errors: Sequence[BuildError]) -> NoReturn:
        self._ended = True
        self.build.close()
        for error in errors:
            self._emit("error", message=str(error), status=error.exit_status)
            print(f"error: {error}", file=sys.stderr)
        self._emit("build-ended", status=errors[0].exit_status)
        raise SystemExit(errors[0].exit_status) from errors[0]

    def _tell(self, message: str) -> None:
        """Says something to the person who waits."""
        if self.as_json:
            self._emit("message", text=message)
        else:
            self._print(message)

    def _emit(self, event: str, **what: Any) -> None:
        if self.as_json:
            self.outstream.write(event_line(event, **what) + "\n")
            self.outstream.flush()

    def _print(self, line: str) -> None:
        if self._display is not None and self._display.live.is_started:
            self._display.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            self.outstream.write(line + "\n")
            self.outstream.flush()

    def _begin_display(self) -> Display:
        from furiosa_build.ui.display import Display

        left = {name: self.build.estimate_seconds(name) for name in self._steps if not self.build.is_done(name)}
        workers = self.build.options.num_compile_workers
        return Display(self.outstream, self._total, left, workers, self.build.bytes_done)


def event_line(event: str, **what: Any) -> str:
    """An event as one line of JSON."""
    return json.dumps({"event": event, "time": time.time(), **what})


def _in_main_thread() -> bool:
    """Signals are handled there only. A build that Python code runs may be in another."""
    return threading.current_thread() is threading.main_thread()


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"
