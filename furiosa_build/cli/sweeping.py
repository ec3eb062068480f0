"""`--multirun`: commands about all points of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_build.cli import running
from furiosa_build.core.errors import StepError

if TYPE_CHECKING:
    from furiosa_build.build.sweep import Sweep


def open_sweep(name: str, overrides: list[str], as_json: bool = False, fail_fast: bool = False) -> Sweep:
    """The sweep over these overrides, with what a command prints of it. Raises UserError for a mistake in any point."""
    running.collect_garbage_rarely()
    from furiosa_build.build.sweep import Sweep
    from furiosa_build.recipe.sweep import sweep_points

    return Sweep(sweep_points(name, overrides), None, running.listeners(as_json), fail_fast)


def plan(name: str, overrides: list[str]) -> str:
    """What the sweep would do, as text."""
    from furiosa_build.ui.sweep_text import sweep_plan_text

    sweep = open_sweep(name, overrides)
    try:
        return sweep_plan_text(sweep)
    finally:
        sweep.close()


def build(name: str, overrides: list[str], as_json: bool, fail_fast: bool) -> int:
    """Builds all points; returns the exit status."""
    from furiosa_build.build import graph

    sweep = open_sweep(name, overrides, as_json, fail_fast)
    status = graph.run(sweep, signals=running.SIGNALS)
    return finish(sweep, overrides, status, as_json)


def finish(sweep: Sweep, overrides: list[str], status: int, as_json: bool = False) -> int:
    """Writes and prints what has become of the points; returns the exit status, that of the run being `status`."""
    from furiosa_build.build.sweep_results import results_of, write_results
    from furiosa_build.ui.sweep_text import results_text

    if not sweep.has_begun:
        return status
    results = results_of(sweep)
    directory = write_results(sweep.name, overrides, results, Path.cwd())
    if not as_json:
        print(results_text(results))
        print(f"results    {directory.relative_to(Path.cwd())}")
    return StepError.exit_status if status or len(sweep.results) < len(sweep.points) else 0
