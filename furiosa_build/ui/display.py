"""The progress of a build on a terminal: one bar for the whole, and a row for each step that runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from furiosa_build.core import progress
from furiosa_build.core.events import (
    ArtifactReady,
    BuildFinished,
    BuildStarted,
    ErrorOccurred,
    Event,
    Interrupted,
    StepFinished,
    StepStarted,
)
from furiosa_build.core.text import duration_text, size_text

_TELLING = 0.02
"""Share of a step's bytes from which on its speed says how long the rest takes."""


class Display:
    """A listener that shows the progress on a terminal, from the first step that runs to the end of the build.

    Attributes:
        bars: What is shown; None before and after.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._build: BuildStarted | None = None
        self.bars: Bars | None = None
        self._finished = 0

    def __call__(self, event: Event) -> None:
        match event:
            case BuildStarted():
                self._build, self._finished = event, 0
            case StepStarted():
                if self.bars is None and self._build is not None:
                    self.bars = Bars(self._stream, self._build)
                if self.bars is not None:
                    self.bars.begin(event)
            case StepFinished():
                self._finished += 1
                if self.bars is not None:
                    self.bars.end(event.step, self._finished)
            case ErrorOccurred() | Interrupted() | ArtifactReady() | BuildFinished() if self.bars is not None:
                self.bars.stop()
                self.bars = None

    def print(self, line: str) -> None:
        """Prints a line, above the bars if there are any."""
        if self.bars is not None:
            self.bars.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()


class Bars(Progress):
    """The bars of one build, shown until `stop`."""

    def __init__(self, stream: TextIO, build: BuildStarted) -> None:
        self._left = dict(build.expected)
        self._workers = build.compile_workers
        self._running: dict[str, tuple[TaskID, float, Path | None]] = {}
        super().__init__(
            BarColumn(),
            _Count(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=Console(file=stream),
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._whole = self.add_task("", total=len(build.steps))
        self.start()

    def begin(self, step: StepStarted) -> None:
        """A step begins: it gets a row."""
        self._running[step.step] = self.add_task(step.step, total=None), time.monotonic(), step.progress_file

    def end(self, step: str, finished: int) -> None:
        """A step has ended; so many are done now."""
        if step in self._running:
            self.remove_task(self._running.pop(step)[0])
        self._left.pop(step, None)
        self.update(self._whole, completed=finished)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Called by rich some times a second."""
        left = dict(self._left)
        for step, (row, begin, progress_file) in list(self._running.items()):
            passed = time.monotonic() - begin
            counted = None if progress_file is None else progress.read(progress_file)
            expected = left.get(step)
            left[step] = None if expected is None else max(expected - passed, 0.0)
            if counted is not None:
                done, total = counted
                self.update(row, completed=done, total=total)
                if done > total * _TELLING:
                    left[step] = passed * (total - done) / done
        for whole in self.tasks[:1]:  # there is none yet when rich first calls
            self.update(whole.id, description=time_left_text(left, self._workers))
        yield from super().get_renderables()


def time_left_text(left: Mapping[str, float | None], workers: int) -> str:
    """The time left, from the seconds that each step still takes. Compile workers share the compiling."""
    known = {name: seconds for name, seconds in left.items() if seconds is not None}
    if len(known) < len(left):
        return "time left not known yet"
    seconds = sum(s / workers if "compile:" in name else s for name, s in known.items())
    return f"about {duration_text(seconds)} left"


class _Count(ProgressColumn):
    """Steps of the whole; bytes of a step that streams them."""

    def render(self, task: Task) -> RenderableType:
        if task.id == 0:
            return Text(f"{task.completed:.0f}/{task.total:.0f} steps")
        return Text("" if task.total is None else f"{size_text(int(task.completed))} of {size_text(int(task.total))}")
