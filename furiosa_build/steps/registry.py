"""The kinds of step that a build is planned of, in the order in which they are planned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from furiosa_build.steps.base import Step
from furiosa_build.steps.compile import Compile
from furiosa_build.steps.fetch import Fetch
from furiosa_build.steps.kernels import Kernels
from furiosa_build.steps.package import Package
from furiosa_build.steps.qualify import Qualify
from furiosa_build.steps.quantize import Quantize
from furiosa_build.steps.shard import Shard
from furiosa_build.steps.trace import Trace

STEPS: list[Step[Any]] = [Fetch(), Quantize(), Shard(), Kernels(), Trace(), Compile(), Package(), Qualify()]


def find(name: str) -> Step[Any]:
    """The kind of step that is called `name`."""
    return next(step for step in STEPS if step.name == name)


@contextmanager
def registered(step: Step[Any], after: str) -> Iterator[None]:
    """Within, builds are planned with one more kind of step, which follows the kind that is called `after`."""
    STEPS.insert(STEPS.index(find(after)) + 1, step)
    try:
        yield
    finally:
        STEPS.remove(step)
