"""The group of commands that both command lines are."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from furiosa_build.cli.exits import exit_with
from furiosa_build.core.errors import BuildError, UserError

_OF_EXTRA_BUILD = ("doit", "huggingface_hub", "hydra", "omegaconf", "rich", "torch", "transformers")


class Commands(TyperGroup):
    """A group of commands. Errors that a person is meant to read, and interrupts, end them with their exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BuildError as error:
            exit_with(error)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _OF_EXTRA_BUILD:
                raise
            hint = "pip install 'furiosa-build[build]'"
            exit_with(UserError(f"the command needs the extra `build`: {error}", hint=hint))
        except KeyboardInterrupt as interrupt:
            exit_with(interrupt)
