"""`furiosa-build serve`: serves an artifact, or a recipe's, which is built first if it must be."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from furiosa_build.cli import running
from furiosa_build.core.errors import UserError


def serve(context: typer.Context) -> None:
    """Serve an artifact, or a recipe's, over HTTP: OpenAI's routes and others. What is not built yet is built first."""
    import argparse

    from furiosa_build.server import options
    from furiosa_build.server.launch import launch

    parser = argparse.ArgumentParser(prog="furiosa-build serve", description="Serve an artifact over HTTP.")
    parser.add_argument(
        "target", metavar="ARTIFACT-or-RECIPE", help="An artifact's directory, or a recipe: it is built if it must be."
    )
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="Hydra overrides of the recipe.")
    options.add_cli_args(parser)
    arguments = parser.parse_intermixed_args(context.args)
    given = options.from_cli_args(arguments)  # before anything is built
    launch(lambda: _artifact_of(arguments.target, arguments.overrides), given)


def _artifact_of(target: str, overrides: list[str]) -> Path:
    """An artifact's directory; of a recipe, that of its artifact, which is built if it is not there."""
    if (Path(target) / "artifact.json").is_file():
        if overrides:
            raise UserError(
                f"{target} is an artifact, which is built already", where=overrides[0], hint="name a recipe"
            )
        return Path(target)
    opened = running.open_build(target, overrides)
    if status := running.run(opened):
        sys.exit(status)
    return opened.version_directory
