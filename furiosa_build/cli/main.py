"""`furiosa-build`: the command line. Every command is a thin face over functions that Python code can call as well."""

from __future__ import annotations

from collections.abc import Callable

import typer

from furiosa_build.cli import artifacts, building, cache, serving
from furiosa_build.cli.exits import Commands

app = typer.Typer(
    cls=Commands,
    help="Builds a large language model into a versioned artifact, and runs it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_COMMANDS: tuple[Callable[..., None], ...] = (
    building.build,
    building.shard,
    building.plan,
    building.explain,
    building.recipes,
    artifacts.inspect,
    artifacts.verify,
    artifacts.sign,
    artifacts.generate,
)
for _command in _COMMANDS:
    app.command()(_command)
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serving.serve
)
app.add_typer(cache.app, name="cache")


def main() -> None:
    """The console script."""
    app()
