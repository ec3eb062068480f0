"""The events of a build as lines of JSON, for programs: docs/output.md lists them."""

from __future__ import annotations

import json
import sys
from typing import Any

from furiosa_build.core.errors import VerificationError
from furiosa_build.core.events import (
    BuildFinished,
    BuildStarted,
    CheckFinished,
    ErrorOccurred,
    Event,
    Note,
    StepFinished,
    StepStarted,
)


class JsonLines:
    """A listener that prints one object a line on stdout. Steps that are up to date have none."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        match event:
            case BuildStarted():
                self._print(event, "build-begun", recipe=event.recipe, steps=event.steps)
            case StepStarted():
                self._started[event.step] = event.time
                self._print(event, "step-begun", step=event.step)
            case StepFinished() if event.state != "up to date":
                self._print(event, "step-ended", **step_data(event, self._started.get(event.step)))
            case Note():
                self._print(event, "message", text=event.text)
            case ErrorOccurred():
                self._print(event, "error", message=event.message, status=event.status)
            case BuildFinished(status=0):
                artifact = {} if event.artifact is None else {"artifact": str(event.artifact)}
                counts = {"ran": event.ran, "up_to_date": event.up_to_date, "seconds": event.seconds}
                self._print(event, "build-ended", status=0, **counts, **artifact)
            case BuildFinished():
                self._print(event, "build-ended", status=event.status)
            case CheckFinished():
                status = VerificationError.exit_status if event.differing else 0
                self._print(event, "check-ended", status=status, differing=event.differing)

    def _print(self, event: Event, name: str, **fields: Any) -> None:
        sys.stdout.write(json.dumps({"event": name, "time": event.time, **fields}) + "\n")
        sys.stdout.flush()


def step_data(event: StepFinished, started: float | None) -> dict[str, Any]:
    """A step's figures as plain data. `started` (Unix seconds): None when it did not start in this build."""
    return {
        "step": event.step,
        "state": event.state,
        "begin": started,
        "end": None if started is None else event.time,
        "seconds": event.seconds,
        "peak_memory": event.peak_memory,
        "peak_mapped": event.peak_mapped,
        "bytes": event.size,
        "key": event.key,
    }
