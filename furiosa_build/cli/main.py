"""`furiosa-build`: the command line. Every command is a thin face over functions that Python code can call as well."""

from __future__ import annotations

from collections.abc import Callable

import typer

from furiosa_build.cli import artifacts, building, cache, measuring, serving, streams
from furiosa_build.cli.commands import Commands

app = typer.Typer(
    cls=Commands,
    help="Builds a large language model into a versioned artifact, and runs it.",
    no_args_is_help=True,
    context_settings={"max_content_width": 120},
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # boxes would cut long names of options
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
    measuring.measure,
)
for _command in _COMMANDS:
    app.command(short_help=_command.__doc__)(_command)
app.command(short_help=serving.serve.__doc__, context_settings={"help_option_names": ["-h", "--help"]})(serving.serve)
app.add_typer(cache.app, name="cache")


def main() -> None:
    """The console script."""
    with streams.lasting():
        app(prog_name="furiosa-build")
