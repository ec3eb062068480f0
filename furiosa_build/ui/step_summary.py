"""A summary of a build in Markdown, for the page of a CI job: GitHub shows what is appended to $GITHUB_STEP_SUMMARY."""

from __future__ import annotations

import sys
from pathlib import Path

from furiosa_build.core.events import (
    BuildFinished,
    BuildStarted,
    ErrorOccurred,
    Event,
    Interrupted,
    StepFinished,
)
from furiosa_build.core.text import duration_text, memory_text, size_text, steps_text

VARIABLE = "GITHUB_STEP_SUMMARY"
_MOST_STEPS = 200
"""How many steps are listed, the slowest: GitHub drops a summary of more than 1 MiB."""
_MOST_CHARACTERS = 2000
"""How many characters of an error are shown."""


class StepSummary:
    """A listener that appends the summary of each build that it hears of to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._recipe = ""
        self._ran: list[StepFinished] = []
        self._problems: list[str] = []

    def __call__(self, event: Event) -> None:
        match event:
            case BuildStarted():
                self._recipe, self._ran, self._problems = event.recipe, [], []
            case StepFinished(state="ran"):
                self._ran.append(event)
            case ErrorOccurred():
                self._problems.append(_fenced(event.message))
            case Interrupted():
                self._problems.append(f"Interrupted by {event.signal}.\n")
            case BuildFinished():
                try:
                    with self._path.open("a", encoding="utf-8") as file:
                        file.write(self._text(event))
                except OSError as error:
                    print(f"the summary cannot be written: {error}", file=sys.stderr)

    def _text(self, event: BuildFinished) -> str:
        outcome = "built" if event.status == 0 else f"exit status {event.status}"
        lines = [
            f"## {self._recipe or 'furiosa-build'}: {outcome}\n",
            *([f"`{event.artifact}`\n"] if event.artifact is not None else []),
            f"{steps_text(event.ran)} ran in {duration_text(event.seconds)}, {event.up_to_date} up to date.\n",
            *self._problems,
        ]
        if self._ran:
            slowest = sorted(self._ran, key=lambda step: -step.seconds)[:_MOST_STEPS]
            lines += ["| step | time | peak memory | output |", "|---|---:|---:|---:|"]
            lines += [
                f"| `{step.step}` | {step.seconds:.1f} s | {memory_text(step.peak_memory)} | {size_text(step.size)} |"
                for step in slowest
            ]
            if rest := len(self._ran) - len(slowest):
                lines.append(f"\nand {steps_text(rest)} that took less time")
        return "\n".join(lines) + "\n\n"


def _fenced(text: str) -> str:
    """The text as it is, in a code block that it cannot end."""
    cut = text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " ..."
    return "\n".join(["````text", cut.replace("````", "'```"), "````\n"])
