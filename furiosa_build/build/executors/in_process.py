"""Steps that run in the build's own process: those that need no torch and are done in an instant."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from furiosa_build.build.executors.base import FindInputs
from furiosa_build.core.peak_memory import Watch
from furiosa_build.steps.base import Inputs, Job, Request
from furiosa_build.store import ActionResult


class InProcess:
    """Runs steps in this process. What they raise comes out as it is, and what they print is not kept.

    Args:
        find: Finds the inputs of a request.
    """

    def __init__(self, find: FindInputs) -> None:
        self._find = find

    def run(self, name: str, job: Job[Any], request: Request, output: Path, log: Path) -> ActionResult:
        """Runs a step."""
        del name, log
        return run_here(job, request, self._find(request), output, children=False)

    def beside(self, find: FindInputs) -> InProcess:
        """Runs steps of another build."""
        return InProcess(find)

    def kill(self) -> None:
        """There is nothing to end."""

    def close(self) -> None:
        """There is nothing to end."""


def run_here(job: Job[Any], request: Request, inputs: Inputs, output: Path, children: bool = True) -> ActionResult:
    """Runs a step in this process. With `children`, the memory of what it starts, such as compilers, is its own too."""
    begin = time.monotonic()
    with Watch(children=children) as watch:
        digests = job.run(request, inputs, output)
    return ActionResult(digests or {}, time.monotonic() - begin, watch.peak)
