"""What a build prints: one line a step that ran, the result at the end, errors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TextIO

from furiosa_build.core.events import (
    ArtifactReady,
    BuildFinished,
    BuildStarted,
    CheckFinished,
    ErrorOccurred,
    Event,
    Note,
    StepFinished,
    SurveyStarted,
)
from furiosa_build.core.text import memory_text
from furiosa_build.ui.artifact_text import result_text

_PUBLISHING = ("package", "qualify")
"""Steps whose output also goes to the output directory, where it may be missing although the store has it."""


class ConsoleLines:
    """A listener that prints what happens as lines of text.

    Args:
        print_line: Prints a line; by default on stdout.
    """

    def __init__(self, print_line: Callable[[str], None] | None = None) -> None:
        self._print = print_line or print_now
        self._total = self._finished = 0

    def __call__(self, event: Event) -> None:
        match event:
            case BuildStarted():
                self._total, self._finished = len(event.steps), 0
            case Note():
                self._print(event.text)
            case StepFinished():
                self._finished += 1
                if event.state != "up to date":
                    self._print(self._step_line(event))
            case ArtifactReady():
                self._print(result_text(event.directory))
            case BuildFinished(status=0) if self._total:
                self._print(
                    f"ran {event.ran} of {self._total} steps in {event.seconds:.1f} s, {event.up_to_date} up to date"
                )
            case CheckFinished(differing=()):
                self._print("the same bytes in every file")

    def _step_line(self, event: StepFinished) -> str:
        if event.state == "ran":
            took = f"{event.seconds:7.1f} s  {memory_text(event.peak_memory):>8}"
        else:
            took = "  found in the store" + (", published again" if event.step in _PUBLISHING else "")
        return f"[{self._finished:{len(str(self._total))}}/{self._total}] {event.step:36} {took}"


def print_now(line: str) -> None:
    """Prints a line on stdout, at once."""
    print(line, flush=True)


def error_lines(stream: TextIO | None = None) -> Callable[[Event], None]:
    """A listener that prints errors, by default on stderr; and on a terminal, what is waited for before a build."""

    def listen(event: Event) -> None:
        output = stream or sys.stderr
        match event:
            case SurveyStarted() if output.isatty():
                print("surveying the model's layers: once for an architecture, some seconds", file=output)
            case ErrorOccurred():
                print(f"{event.traceback}error: {event.message}", file=output)
            case CheckFinished(differing=[_, *_]):
                listed = "".join(f"\n  {line}" for line in event.differing)
                print(f"error: built again, {event.directory} is not the same:{listed}", file=output)

    return listen
