"""Worker processes for the steps that need torch. They live on between steps: importing torch costs seconds.

The build's own process never imports torch. What a step prints, and what compilers print, goes to the step's log.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from furiosa_build.errors import StepError, UserError
from furiosa_build.store import Made


class Pool:
    """At most `workers` processes; none is started before it is needed."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._executor: ProcessPoolExecutor | None = None
        self._starting = threading.Lock()

    def run(self, step: str, module: str, request: dict[str, Any], output: Path, log: Path) -> Made:
        """Runs `furiosa_build.steps.MODULE` in a worker and waits. The log is kept when the step fails.

        Raises UserError as the step raised it, StepError for anything else that goes wrong.
        """
        with self._starting:
            if self._executor is None:
                self._executor = ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn"))
            executor = self._executor
        try:
            outcome, value = executor.submit(_work, module, request, output, log).result()
        except BrokenProcessPool as error:
            self._executor = None
            raise StepError(step, "its process was killed (out of memory?)", str(log)) from error
        if outcome != "failed":
            log.unlink(missing_ok=True)
        if outcome == "user error":
            raise UserError(**value)
        if outcome == "failed":
            raise StepError(step, value, str(log))
        return value  # type: ignore[no-any-return]

    def close(self) -> None:
        """Ends the workers."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None


def run_here(module: str, request: dict[str, Any], output: Path) -> Made:
    """Runs a step in this process."""
    begin = time.monotonic()
    digests = import_module(f"furiosa_build.steps.{module}").run(request, output)
    return Made(digests or {}, time.monotonic() - begin)


def _work(module: str, request: dict[str, Any], output: Path, log: Path) -> tuple[str, Any]:
    with _output_to(log):
        try:
            return "done", run_here(module, request, output)
        except UserError as error:
            return "user error", {
                "what": error.what,
                "where": error.where,
                "valid": error.valid,
                "hint": error.hint,
            }
        except Exception as error:
            traceback.print_exc()
            first_line = (str(error).strip().splitlines() or [""])[0]
            return "failed", f"{type(error).__name__}: {first_line}"


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Sends what this process and its children write to stdout and stderr to `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, target in zip(saved, (1, 2), strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
