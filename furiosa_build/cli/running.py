"""How a command runs a build: what it prints, and the signals that end it."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_build.core.events import Listener

if TYPE_CHECKING:
    from furiosa_build.build.build import Build
    from furiosa_build.recipe.schema import Recipe

SIGNALS = (signal.SIGTERM,)
"""What ends a build besides Ctrl-C."""


def open_build(name: str, overrides: list[str], as_json: bool = False) -> Build:
    """The build of the recipe of that name, with what a command prints and writes of it. Raises UserError."""
    collect_garbage_rarely()
    from furiosa_build.recipe.compose import load_recipe

    return open_recipe(load_recipe(name, overrides), as_json)


def open_recipe(recipe: Recipe, as_json: bool = False) -> Build:
    """The build of a recipe, with what a command prints and writes of it. Raises UserError."""
    from furiosa_build.build import build as builds
    from furiosa_build.ui.report import ReportFiles

    build = builds.open_recipe(recipe, listeners=listeners(as_json))
    build.events.listeners.append(ReportFiles(build))
    return build


def open_to_look(name: str, overrides: list[str]) -> Build:
    """The build of the recipe of that name, which is not run: nothing is printed on stdout. Raises UserError."""
    collect_garbage_rarely()
    from furiosa_build.build import build as builds
    from furiosa_build.ui.console import error_lines

    return builds.open_build(name, overrides, listeners=[error_lines()])


def collect_garbage_rarely() -> None:
    """What is imported and planned lasts as long as the command: searching it for garbage takes 40 ms of 600."""
    gc.set_threshold(100_000)


def run(build: Build, task: str = "build", shards: Path | None = None) -> int:
    """Runs a task as `build.graph.run` does; returns the exit status. Raises KeyboardInterrupt."""
    from furiosa_build.build import graph

    return graph.run(build, task, shards=shards, signals=SIGNALS)


def listeners(as_json: bool = False) -> list[Listener]:
    """What a command prints of a build: lines or JSON on stdout, errors on stderr; a summary where CI wants one."""
    from furiosa_build.ui.console import ConsoleLines, error_lines

    found: list[Listener] = []
    if as_json:
        from furiosa_build.ui.json_events import JsonLines

        found.append(JsonLines())
    elif sys.stdout.isatty():
        from furiosa_build.ui.display import Display

        display = Display(sys.stdout)
        found += [display, ConsoleLines(display.print)]
    else:
        found.append(ConsoleLines())
    found.append(error_lines())
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        from furiosa_build.ui.step_summary import StepSummary

        found.append(StepSummary(Path(summary)))
    return found
