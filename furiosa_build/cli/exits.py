"""How commands end when something goes wrong: one message on stderr, and an exit status."""

from __future__ import annotations

import signal
import sys
from typing import Any, NoReturn

from typer.core import TyperGroup

from furiosa_build.core.errors import BuildError, BuildInterrupted


class Commands(TyperGroup):
    """A group of commands. Errors that a person is meant to read, and interrupts, end them with their exit status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BuildError as error:
            exit_with(error)
        except KeyboardInterrupt as interrupt:
            exit_with(interrupt)


def exit_with(error: BuildError | KeyboardInterrupt) -> NoReturn:
    """Says what went wrong, and ends the process."""
    if isinstance(error, BuildError):
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    number = error.signal if isinstance(error, BuildInterrupted) else signal.SIGINT
    print(f"interrupted by {number.name}", file=sys.stderr)
    sys.exit(128 + number)
