"""`doit build recipe=NAME [key=value ...]`: the build graph for doit, which finds this module through pyproject.toml.

`furiosa-build` runs the same tasks from any directory.
"""

from __future__ import annotations

import atexit
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from doit import doit_cmd

from furiosa_build.build.build import Build
from furiosa_build.build.graph import action, doit_config, doit_tasks
from furiosa_build.build.reporter import EventReporter
from furiosa_build.build.sweep import Sweep
from furiosa_build.cli import running, streams, sweeping
from furiosa_build.cli.exits import exit_with
from furiosa_build.core.errors import BuildError, BuildInterrupted, UserError
from furiosa_build.recipe.compose import list_recipes
from furiosa_build.ui.explain_text import explain_text

_MULTIRUN = {"-m", "--multirun"}
_MULTIRUN_PARAMETER = {
    "name": "multirun",
    "short": "m",
    "long": "multirun",
    "type": bool,
    "default": False,
    "help": "all points of a sweep: quantization=none,int8",
}


class ExitingReporter(EventReporter):
    """Ends the process with the status of this project where doit would end it with its own."""

    def complete_run(self) -> None:
        super().complete_run()
        if isinstance(_build, Sweep):
            overrides = [f"{key}={value}" for key, value in doit_cmd._CMDLINE_VARS.items() if key != "recipe"]
            if status := sweeping.finish(_build, overrides, self.status):
                sys.exit(streams.final_status(status))
        try:
            self.raise_failure()
        except BuildError as error:  # a listener has printed it
            sys.exit(streams.final_status(error.exit_status))
        except BuildInterrupted as interrupted:
            exit_with(interrupted)
        if status := streams.final_status(0):
            sys.exit(status)


def build_of_command_line() -> Build | Sweep | None:
    """What `recipe=NAME key=value ...` describes; None when it is not doit that loads this module."""
    if doit_cmd._CMDLINE_VARS is None:
        return None
    streams.set_up()
    arguments = dict(doit_cmd._CMDLINE_VARS)
    recipe = arguments.pop("recipe", None)
    try:
        if recipe is None:
            raise _which_recipe()
        overrides = [f"{key}={value}" for key, value in arguments.items()]
        # doit parses the options of a task after it has loaded this module.
        if not _MULTIRUN.isdisjoint(sys.argv[1:]):
            return sweeping.open_sweep(recipe, overrides)
        return running.open_build(recipe, overrides)
    except BuildError as error:
        exit_with(error)


def _which_recipe() -> UserError:
    recipes = list_recipes()
    width = max((len(recipe.name) for recipe in recipes), default=0)
    there_are = "".join(f"\n    {recipe.name:{width}}  {recipe.description}" for recipe in recipes)
    return UserError(f"which recipe? doit build recipe=NAME [key=value ...]\n  there are:{there_are}")


# Done while doit loads this module: a mistake ends it before doit has made its state file in the current directory.
_build = build_of_command_line()
if _build is not None:
    _reporter = ExitingReporter(_build, running.SIGNALS)
    _state = tempfile.TemporaryDirectory(prefix="furiosa-build-doit-")
    atexit.register(_state.cleanup)
    DOIT_CONFIG = doit_config(_build, _reporter, Path(_state.name))


def task_steps() -> Iterator[dict[str, Any]]:
    """Called by doit."""
    assert _build is not None
    for task in doit_tasks(_build, _reporter):
        yield {**task, "params": [_MULTIRUN_PARAMETER]} if task["basename"] == "build" else task
    if isinstance(_build, Sweep):
        return
    yield {
        "basename": "explain",
        "doc": "say for each step whether it is up to date, and if not, why",
        "actions": [action(_reporter, "explain", _explain, _build)],
        "io": {"capture": False},
    }


def _explain(build: Build) -> None:
    print(explain_text(build.explain()))
