"""What a build hands to a step, for steps that a test runs by itself."""

from __future__ import annotations

from typing import Any

from furiosa_build.build.build import Build


def weights_request(build: Build, step: str) -> dict[str, Any]:
    """The request of `quantize`, `partition:weights` or `qualify`. Runs the steps before it."""
    for name in build.plan.steps:
        if name == step:
            break
        build.run(name)
    return build._weights_request(build.plan.steps[step])


def trace_request(build: Build, step: str) -> dict[str, Any]:
    """The request of a `partition:BUCKET:KIND`."""
    return build._trace_request(build.plan.steps[step])
