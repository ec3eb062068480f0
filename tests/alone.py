"""Tests of memory in a process of their own: in pytest's, what other tests have left is given back at any time."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
from collections.abc import Callable


def alone(body: Callable[[], None]) -> Callable[[], None]:
    """The test, which takes no fixtures, in a new process. What it prints, such as why it fails, is shown."""

    @functools.wraps(body)
    def test() -> None:
        process = multiprocessing.get_context("spawn").Process(target=_run, args=(body.__module__, body.__name__))
        process.start()
        process.join()
        assert process.exitcode == 0

    return test


def _run(module: str, name: str) -> None:
    getattr(importlib.import_module(module), name).__wrapped__()
