"""The kinds of step there are."""

from __future__ import annotations

from typing import Any

from furiosa_build.steps.base import Step
from furiosa_build.steps.compile import Compile
from furiosa_build.steps.qualify import Qualify
from furiosa_build.steps.quantize import Quantize
from furiosa_build.steps.shard import Shard
from furiosa_build.steps.survey import Survey
from furiosa_build.steps.trace import Trace

_STEPS: list[Step[Any]] = [Survey(), Quantize(), Shard(), Trace(), Compile(), Qualify()]


def find(name: str) -> Step[Any]:
    """The kind of step that is called `name`."""
    return next(step for step in _STEPS if step.name == name)
