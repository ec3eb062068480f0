"""The progress of a build on a terminal: one bar for the whole, and a row for each step that runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from furiosa_build.core.text import duration_text, size_text

_TELLING = 0.02
"""Share of a step's bytes from which on its speed is believed."""


class Display(Progress):
    """Begun when it is made; `stop` ends it.

    Args:
        stream: The terminal.
        total: Steps that the build may come to.
        left: Steps that are not done, with the seconds that each is expected to take; None: unknown.
        workers: How many steps compile at a time.
        bytes_done: Bytes done and bytes in all of a running step; None of a step that streams none.
    """

    def __init__(
        self,
        stream: TextIO,
        total: int,
        left: Mapping[str, float | None],
        workers: int,
        bytes_done: Callable[[str], tuple[int, int] | None],
    ) -> None:
        self._expected = dict(left)
        self._workers = workers
        self._bytes_done = bytes_done
        self._running: dict[str, tuple[TaskID, float]] = {}
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
        self._whole = self.add_task("", total=total)
        self.start()

    def begins(self, step: str) -> None:
        """A step begins."""
        self._running[step] = self.add_task(step, total=None), time.monotonic()

    def ends(self, step: str, done: int) -> None:
        """A step has ended; `done` are now done in all."""
        if step in self._running:
            self.remove_task(self._running.pop(step)[0])
        self._expected.pop(step, None)
        self.update(self._whole, completed=done)

    def get_renderables(self) -> Iterable[RenderableType]:
        """Called by rich some times a second."""
        left = dict(self._expected)
        for step, (row, begin) in list(self._running.items()):
            passed, counted = time.monotonic() - begin, self._bytes_done(step)
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
    """From the seconds that each step still takes. Compile workers share the compiling."""
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
