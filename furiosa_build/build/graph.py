"""The build graph as doit tasks, and how they are run. doit orders the steps; the store decides what is to do."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from doit.cmd_base import ModuleTaskLoader
from doit.cmd_run import Run
from doit.exceptions import InvalidTask, TaskError

from furiosa_build.build.build import Build
from furiosa_build.build.reporter import EventReporter
from furiosa_build.build.runnable import Runnable
from furiosa_build.core.errors import BuildError


def run(build: Runnable, task: str = "build", *, shards: Path | None = None, signals: Sequence[int] = ()) -> int:
    """Runs a task and what it needs as `execute` does; returns the exit status, also that of an error.

    Raises KeyboardInterrupt when the run is interrupted.
    """
    try:
        execute(build, task, shards=shards, signals=signals)
    except BuildError as error:
        return error.exit_status
    return 0


def execute(build: Runnable, task: str = "build", *, shards: Path | None = None, signals: Sequence[int] = ()) -> None:
    """Runs a task and what it needs. The build's listeners are told of all that happens, errors included.

    Args:
        build: What is built. It is closed at the end.
        task: Such as `build`, `compile`, `partition:weights`.
        shards: Where task `shard` writes.
        signals: What ends the run besides Ctrl-C, if it is in the main thread.

    Raises:
        BuildError: The build was refused, or a step failed; of several errors the first.
        BuildInterrupted: A KeyboardInterrupt, once the workers have ended. Finished steps are in the store.
    """
    reporter = EventReporter(build, signals)
    with tempfile.TemporaryDirectory(prefix="furiosa-build-doit-") as state:
        config = doit_config(build, reporter, Path(state))
        tasks = {"DOIT_CONFIG": config, "task_steps": lambda: doit_tasks(build, reporter, shards)}
        Run(task_loader=ModuleTaskLoader(tasks)).parse_execute([task])
    reporter.raise_failure()


def doit_config(build: Runnable, reporter: EventReporter, state: Path) -> dict[str, Any]:
    """doit's settings for one run. What it keeps in directory `state` is to be thrown away: the store is the truth."""
    options = build.options
    return {
        "backend": "json",
        "dep_file": str(state / "state.json"),
        "default_tasks": ["build"],
        "par_type": "thread",
        "num_process": options.num_compile_workers + options.num_pipeline_builder_workers,
        "reporter": reporter,
        "verbosity": 2,
        "continue": build.goes_on,
    }


def doit_tasks(build: Runnable, reporter: EventReporter, shards: Path | None = None) -> Iterator[dict[str, Any]]:
    """One task a step, and `build` for all of them; `shard`, where there is a directory for the shards."""
    for group, doc in build.group_docs.items():
        yield {"basename": group, "name": None, "doc": doc}
    for step_name, step in build.steps.items():
        basename, _, name = step_name.partition(":")
        yield {
            "basename": basename,
            **({"name": name} if name else {}),
            "doc": step.description,
            "actions": [action(reporter, step_name, build.run, step_name)],
            # doit would put a stream of its own in place of sys.stdout, for all threads at once.
            "io": {"capture": False},
            "uptodate": [(_is_done, (build, reporter, step_name))],
            "task_dep": list(step.needs),
        }
    if shards is not None:
        from furiosa_build.build import export_shards

        yield {
            "basename": "shard",
            "actions": [action(reporter, "shard", _shard, build, shards)],
            "io": {"capture": False},
            "task_dep": [export_shards.STEP],
        }
    yield {
        "basename": "build",
        "doc": f"build artifact {build.name}: all of these steps",
        "actions": None,
        "task_dep": list(build.goals),
    }


def action(
    reporter: EventReporter, step: str, work: Callable[..., Any], *arguments: Any
) -> tuple[Callable[[], TaskError | None]]:
    """An action of a doit task: does `work`, and tells the reporter when it fails."""

    def run_work() -> TaskError | None:
        try:
            work(*arguments)
        except Exception as error:
            reporter.fail(step, error)
            return TaskError(str(error), report=False)
        return None

    return (run_work,)


def _shard(build: Build, directory: Path) -> None:
    from furiosa_build.build import export_shards

    build.events.note(export_shards.write_shards(build, directory))


def _is_done(task: Any, values: Any, build: Runnable, reporter: EventReporter, step: str) -> bool:
    del task, values
    try:
        return build.is_done(step)
    except Exception as error:
        reporter.fail(step, error)
        raise InvalidTask(str(error)) from error
