from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from furiosa_build.core.events import Event
from furiosa_build.ui.json_events import JsonLines

from .scenes import FAILED, INTERRUPTED, STEPS, WELL


def printed(events: Iterable[Event], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    listener = JsonLines()
    for event in events:
        listener(event)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_build(capsys: pytest.CaptureFixture[str]) -> None:
    step = {
        "event": "step-ended",
        "time": 13.5,
        "begin": 12.0,
        "end": 13.5,
        "seconds": 1.25,
        "peak_memory": 2_000_000,
        "peak_mapped": None,
        "bytes": 1500,
        "key": "abc",
    }
    assert printed(WELL, capsys) == [
        {"event": "build-begun", "time": 10.0, "recipe": "tiny", "steps": list(STEPS)},
        {"event": "message", "time": 11.0, "text": "KV cache: 8 blocks"},
        {"event": "step-begun", "time": 12.0, "step": "quantize"},
        {**step, "step": "quantize", "state": "ran"},
        {"event": "step-begun", "time": 12.0, "step": "package"},
        {**step, "step": "package", "state": "reused"},
        {
            "event": "build-ended",
            "time": 14.0,
            "status": 0,
            "ran": 1,
            "up_to_date": 2,
            "seconds": 4.0,
            "artifact": "/out/tiny/1d19a46d5a63",
        },
    ]


def test_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(FAILED, capsys)[-2:] == [
        {"event": "error", "time": 13.0, "message": "step fetch failed: why\n  log: there", "status": 3},
        {"event": "build-ended", "time": 14.0, "status": 3},
    ]


def test_an_interrupt(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(INTERRUPTED, capsys)[-1] == {"event": "build-ended", "time": 14.0, "status": 143}
