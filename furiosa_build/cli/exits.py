"""How commands end when something goes wrong: one message on stderr, and an exit status."""

from __future__ import annotations

import signal
import sys
from typing import NoReturn

from furiosa_build.core.errors import BuildError, BuildInterrupted


def exit_with(error: BuildError | KeyboardInterrupt) -> NoReturn:
    """Says what went wrong, and ends the process."""
    if isinstance(error, BuildError):
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    number = error.signal if isinstance(error, BuildInterrupted) else signal.SIGINT
    print(f"interrupted by {number.name}", file=sys.stderr)
    sys.exit(128 + number)
