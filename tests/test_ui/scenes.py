"""Builds as sequences of events, for the listeners' tests: whole outputs are compared."""

from __future__ import annotations

from pathlib import Path

from furiosa_build.core.events import (
    BuildFinished,
    BuildStarted,
    ErrorOccurred,
    Event,
    Interrupted,
    Note,
    StepFinished,
    StepStarted,
    StepState,
    SurveyStarted,
)

STEPS = ("fetch", "quantize", "package")
STARTED = BuildStarted(time=10.0, recipe="tiny", steps=STEPS, expected={"package": None}, compile_workers=1)
NOTE = Note(time=11.0, text="KV cache: 8 blocks")


def begun(step: str, time: float = 12.0) -> StepStarted:
    return StepStarted(time=time, step=step, progress_file=None)


def done(step: str, state: StepState, seconds: float = 1.25, time: float = 13.5) -> StepFinished:
    return StepFinished(
        time=time,
        step=step,
        state=state,
        seconds=seconds,
        peak_memory=2_000_000,
        peak_mapped=None,
        size=1500,
        key="abc",
    )


WELL: list[Event] = [
    SurveyStarted(time=9.0),
    STARTED,
    NOTE,
    done("fetch", "up to date"),
    begun("quantize"),
    done("quantize", "ran"),
    begun("package"),
    done("package", "reused"),
    BuildFinished(time=14.0, status=0, ran=1, up_to_date=2, seconds=4.0, artifact=Path("/out/tiny/1d19a46d5a63")),
]
FAILED: list[Event] = [
    STARTED,
    begun("fetch"),
    Note(time=12.5, text="0 steps ran, kept in the store; the next build goes on from there"),
    ErrorOccurred(time=13.0, message="step fetch failed: why\n  log: there", status=3),
    BuildFinished(time=14.0, status=3, ran=0, up_to_date=0, seconds=4.0),
]
INTERRUPTED: list[Event] = [
    STARTED,
    Interrupted(time=13.0, signal="SIGTERM"),
    BuildFinished(time=14.0, status=143, ran=0, up_to_date=0, seconds=4.0),
]
