"""What a build hands to a step, for steps that a test runs by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from furiosa_build.build.build import Build
from furiosa_build.steps import registry
from furiosa_build.steps.base import Inputs, Request


@dataclass(frozen=True)
class Job:
    """A step that can be run: `request` is what it is to do, `inputs` the files for that."""

    kind: str
    request: Any
    inputs: Inputs

    def run(self, output: Path) -> Any:
        """Runs the step, and returns what it does."""
        return registry.find(self.kind).run(self.request, self.inputs, output)

    def changed(self, **fields: Any) -> Job:
        """With other fields in the request."""
        return replace(self, request=self.request.model_copy(update=fields))

    def with_files(self, files: dict[str, Path]) -> Job:
        """With other files in place of some."""
        return replace(self, inputs=replace(self.inputs, files={**self.inputs.files, **files}))


def job(build: Build, step: str) -> Job:
    """The job of a step, for which those that it needs are run."""
    planned = build.plan.steps[step]
    for needed in planned.needs:
        run_with_needs(build, needed)
    request: Request = planned.type.request(planned, build.files)
    return Job(planned.action, request, build.files.inputs(request))


def run_with_needs(build: Build, step: str) -> None:
    """Runs a step after those that it needs."""
    for needed in build.plan.steps[step].needs:
        run_with_needs(build, needed)
    build.run(step)
