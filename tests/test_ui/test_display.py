from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from furiosa_build.core.events import BuildFinished, BuildStarted, StepFinished, StepStarted
from furiosa_build.core.progress import Meter
from furiosa_build.ui.display import Display, time_left_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which is `clock[0]`."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def lines(display: Display) -> list[str]:
    """What stands on the terminal now, without the bars and the time that has passed."""
    assert display.bars is not None
    paper = Console(file=io.StringIO(), width=120)
    paper.print(*display.bars.get_renderables())
    text = paper.file.getvalue()  # type: ignore[attr-defined]
    return [" ".join(re.sub(r"[━╸╺]|\d:\d\d:\d\d", "", line).split()) for line in text.splitlines()]


def finished(step: str) -> StepFinished:
    return StepFinished(step=step, state="ran", seconds=1.0, peak_memory=1, peak_mapped=1, size=1, key="k")


@pytest.mark.parametrize(
    ("left", "text"),
    [
        ({"fetch": None, "quantize": 3.0}, "time left not known yet"),
        ({"quantize": 3.0, "qualify": 60.0}, "about 63 s left"),
        ({"compile:a": 30.0, "compile:b": 30.0}, "about 30 s left"),
        ({"compile:a": 30.0, "draft:compile:a": 30.0}, "about 30 s left"),
        ({}, "about 0 s left"),
    ],
)
def test_time_left(left: Mapping[str, float | None], text: str) -> None:
    assert time_left_text(left, workers=2) == text


def test_the_whole_and_a_row_for_each_step_that_runs(clock: list[float], tmp_path: Path) -> None:
    meter = Meter(tmp_path / "meter")
    meter.note(0, 2_000_000)
    terminal = Terminal()
    display = Display(terminal)
    expected = {"quantize": None, "compile:a": 10.0, "qualify": 5.0}
    display(BuildStarted(recipe="tiny", steps=tuple(expected), expected=expected, compile_workers=2))
    assert display.bars is None, "nothing is shown of a build that has nothing to do"
    display.print("a line")
    assert terminal.getvalue() == "a line\n"
    display(StepStarted(step="quantize", progress_file=meter.path))
    display(StepStarted(step="compile:a", progress_file=tmp_path / "none"))
    try:
        assert lines(display) == [
            "0/3 steps time left not known yet",
            "0 B of 2 MB quantize",
            "compile:a",
        ]
        clock[0] += 8
        meter.note(500_000, 2_000_000)
        assert lines(display)[:2] == [
            # 24 s of quantize: three times as long as the quarter took; 2 s of compile by two workers; 5 s of qualify.
            "0/3 steps about 30 s left",
            "500 kB of 2 MB quantize",
        ]
        display(finished("quantize"))
        assert lines(display) == ["1/3 steps about 6 s left", "compile:a"]
    finally:
        display(BuildFinished(status=0, ran=1, up_to_date=0, seconds=1.0))
    assert display.bars is None
