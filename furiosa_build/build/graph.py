"""The build graph as doit tasks: `doit build recipe=NAME [key=value ...]`. doit orders the steps; the store decides.

doit finds this module through pyproject.toml; `furiosa-build` runs the same tasks from any directory.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from doit import doit_cmd
from doit.cmd_base import ModuleTaskLoader
from doit.exceptions import TaskError

from furiosa_build.build import export_shards
from furiosa_build.build.build import Build, open_build
from furiosa_build.core.errors import BuildError, StepError, UserError
from furiosa_build.plan.planner import DRAFT
from furiosa_build.recipe.compose import list_recipes
from furiosa_build.ui.console import BuildReporter
from furiosa_build.ui.describe import explain_text


def doit_config(build: Build) -> dict[str, Any]:
    """doit's settings for one invocation. Its state file is thrown away: the store remembers better."""
    state = Path(tempfile.mkdtemp(prefix="furiosa-build-doit-"))
    atexit.register(shutil.rmtree, state, ignore_errors=True)
    options = build.options
    return {
        "backend": "json",
        "dep_file": str(state / "state.json"),
        "default_tasks": ["build"],
        "par_type": "thread",
        "num_process": options.num_compile_workers + options.num_pipeline_builder_workers,
        "reporter": BuildReporter,
        "outfile": sys.stdout,
        "verbosity": 2,
    }


def doit_tasks(build: Build, shards: Path | None = None) -> Iterator[dict[str, Any]]:
    """One task a step, and `build` for all of them; `shard`, where there is a directory for the shards."""
    BuildReporter.build = build
    yield {"basename": "partition", "name": None, "doc": "lay out the weights, and trace every kind in every bucket"}
    yield {"basename": "compile", "name": None, "doc": "compile every graph"}
    if build.draft is not None:
        yield {
            "basename": DRAFT.rstrip(":"),
            "name": None,
            "doc": f"build {build.draft.spec.name}, which proposes tokens",
        }
    for step in build.plan.steps.values():
        basename, _, name = step.name.partition(":")
        yield {
            "basename": basename,
            **({"name": name} if name else {}),
            "doc": step.description,
            "actions": [(_run, (build, step.name))],
            # doit would put a stream of its own in place of sys.stdout, for all threads at once.
            "io": {"capture": False},
            "uptodate": [(_is_done, (build, step.name))],
            "task_dep": list(step.needs),
        }
    yield {
        "basename": "explain",
        "doc": "say for each step whether it is up to date, and if not, why",
        "actions": [(_explain, (build,))],
        "io": {"capture": False},
    }
    if shards is not None:
        yield {
            "basename": "shard",
            "actions": [(_shard, (build, shards))],
            "io": {"capture": False},
            "task_dep": [export_shards.STEP],
        }
    yield {
        "basename": "build",
        "doc": f"build artifact {build.spec.name}: all of these steps",
        "actions": None,
        "task_dep": ["qualify"],
    }


def run(build: Build, task: str = "build", as_json: bool = False, shards: Path | None = None) -> int:
    """Runs a task and what it needs; returns the exit status.

    Args:
        build: What is built.
        task: Such as `build`, `compile`, `partition:weights`.
        as_json: Print an event a line in place of text.
        shards: Where task `shard` writes.
    """
    BuildReporter.as_json = as_json
    loader = ModuleTaskLoader({"DOIT_CONFIG": doit_config(build), "task_steps": lambda: doit_tasks(build, shards)})
    status: int = doit_cmd.DoitMain(loader, config_filenames=()).run([task])
    return status


def _run(build: Build, name: str) -> TaskError | None:
    try:
        build.run(name)
    except BuildError as error:
        BuildReporter.errors.append(error)
        return TaskError(str(error), report=False)
    return None


def _shard(build: Build, directory: Path) -> TaskError | None:
    try:
        print(export_shards.write_shards(build, directory))
    except (BuildError, OSError) as found:
        error = found if isinstance(found, BuildError) else StepError("shard", f"{type(found).__name__}: {found}")
        BuildReporter.errors.append(error)
        return TaskError(str(error), report=False)
    return None


def _explain(build: Build) -> None:
    print(explain_text(build.explain()))


def _is_done(task: Any, values: Any, build: Build, name: str) -> bool:
    del task, values
    return build.is_done(name)


def _build_of_command_line() -> Build | None:
    """The build that `recipe=NAME key=value ...` describes; None when it is not doit that loads this module."""
    if doit_cmd._CMDLINE_VARS is None:
        return None
    arguments = dict(doit_cmd._CMDLINE_VARS)
    recipe = arguments.pop("recipe", None)
    try:
        if recipe is None:
            raise _which_recipe()
        return open_build(recipe, [f"{key}={value}" for key, value in arguments.items()])
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


def _which_recipe() -> UserError:
    recipes = list_recipes()
    width = max((len(recipe.name) for recipe in recipes), default=0)
    there_are = "".join(f"\n    {recipe.name:{width}}  {recipe.description}" for recipe in recipes)
    return UserError(f"which recipe? doit build recipe=NAME [key=value ...]\n  there are:{there_are}")


# Done while doit loads this module: a mistake ends it before doit has made its state file in the current directory.
_build = _build_of_command_line()
if _build is not None:
    DOIT_CONFIG = doit_config(_build)


def task_steps() -> Iterator[dict[str, Any]]:
    """Called by doit."""
    assert _build is not None
    yield from doit_tasks(_build)
