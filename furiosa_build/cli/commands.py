"""The group of commands that both command lines are."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from furiosa_build.cli.exits import exit_with
from furiosa_build.core.errors import BuildError


class Commands(TyperGroup):
    """A group of commands. Errors that a person is meant to read, and interrupts, end them with their exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BuildError as error:
            exit_with(error)
        except KeyboardInterrupt as interrupt:
            exit_with(interrupt)
