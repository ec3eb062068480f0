"""A Python process of this step: it runs a module, and how it ends is told in words."""

from __future__ import annotations

import signal
import subprocess
import sys
from types import TracebackType

from furiosa_build.core.errors import StepError


class Child:
    """A process that runs a module of this project; a context manager, at whose end it has ended.

    It ends early when this process does, since its standard input is then at its end.

    Args:
        whose: What does not run if it fails: `the artifact`.
        module: What it runs.
        arguments: Its arguments.
    """

    def __init__(self, whose: str, module: str, *arguments: str) -> None:
        self._whose = whose
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:  # closes its streams and waits
            self._process.kill()

    def finish(self, given: str | None = None) -> None:
        """Waits for its end. Raises StepError if it fails.

        Args:
            given: Its standard input; None: it is open as long as the process runs.
        """
        if given is None:
            assert self._process.stderr is not None
            told = self._process.stderr.read()
            self._process.wait()
        else:
            _, told = self._process.communicate(given)
        sys.stderr.write(told)  # the step's log
        if self._process.returncode != 0:
            raise StepError("qualify", f"{self._whose} does not run: {_reason(told, self._process.returncode)}")


def _reason(told: str, status: int) -> str:
    """What a process said at its end, or by what it was ended."""
    if status < 0:
        number = signal.Signals(-status)
        return f"its process was ended by {number.name}{' (out of memory?)' if number == signal.SIGKILL else ''}"
    lines = [line for line in told.splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        lines = lines[-1:]
    return "\n".join(lines) or f"exit status {status}, and not a word"
