"""What runs steps: an executor finds the files of a request where it runs the step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from furiosa_build.steps.base import Inputs, Job, Request
from furiosa_build.store import ActionResult

FindInputs = Callable[[Request], Inputs]
"""Finds the inputs of a request on this machine."""


class Executor(Protocol):
    """Runs steps, in processes or on machines of its own."""

    def run(self, name: str, job: Job[Any], request: Request, output: Path, log: Path) -> ActionResult:
        """Runs the step that is called `name` and waits; what it and its tools print goes to `log`.

        Raises UserError as the step raised it, StepError for anything else that goes wrong.
        """
        ...

    def beside(self, find: FindInputs) -> Executor:
        """Runs the steps of another build in the same processes. `find`: finds the inputs of its requests."""
        ...

    def kill(self) -> None:
        """Ends at once what runs; the steps fail, and no other begins. For signal handlers."""
        ...

    def close(self) -> None:
        """Ends its processes."""
        ...
