"""`furiosa-build serve`: serves an artifact, or a recipe's, which is built first if it must be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from furiosa_build.cli import running
from furiosa_build.cli.server_options import with_server_options
from furiosa_build.core.errors import UserError
from furiosa_build.server.launch import launch
from furiosa_build.server.options import ServerOptions

Target = Annotated[
    str,
    typer.Argument(
        metavar="ARTIFACT-or-RECIPE", help="An artifact's directory, or a recipe: it is built if it must be."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE ...]", help="Hydra overrides of the recipe.")
]


@with_server_options
def serve(target: Target, options: ServerOptions, overrides: Overrides = None) -> None:
    """Serve an artifact, or a recipe's, over HTTP: OpenAI's routes and others. What is not built yet is built first."""
    launch(lambda: _artifact_of(target, overrides or []), options)


def _artifact_of(target: str, overrides: list[str]) -> Path:
    """An artifact's directory; of a recipe, that of its artifact, which is built if it is not there."""
    from furiosa_build.artifact.reader import artifact_directory, find_artifact

    # No recipe has a slash in its name: what is wrong with such a target is what is wrong with the artifact.
    if (found := artifact_directory(target) if "/" in target else find_artifact(target)) is not None:
        if overrides:
            raise UserError(
                f"{target} is an artifact, which is built already", where=overrides[0], hint="name a recipe"
            )
        return found
    opened = running.open_build(target, overrides)
    if status := running.run(opened):
        sys.exit(status)
    return opened.version_directory
