from __future__ import annotations

import io
import re
import time
from collections.abc import Mapping

import pytest
from rich.console import Console

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


def shown(left: Mapping[str, float | None], bytes_done: Mapping[str, tuple[int, int]]) -> Display:
    return Display(Terminal(), 3, left, 2, bytes_done.get)


def lines(display: Display) -> list[str]:
    """What stands on the terminal now, without the bars and the time that has passed."""
    paper = Console(file=io.StringIO(), width=120)
    paper.print(*display.get_renderables())
    text = paper.file.getvalue()  # type: ignore[attr-defined]
    return [" ".join(re.sub(r"[━╸╺]|\d:\d\d:\d\d", "", line).split()) for line in text.splitlines()]


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


def test_the_whole_and_a_row_for_each_step_that_runs(clock: list[float]) -> None:
    metered = {"quantize": (0, 2_000_000)}
    shows = shown({"quantize": None, "compile:a": 10.0, "qualify": 5.0}, metered)
    try:
        shows.begins("quantize")
        shows.begins("compile:a")
        assert lines(shows) == [
            "0/3 steps time left not known yet",
            "0 B of 2 MB quantize",
            "compile:a",
        ]
        clock[0] += 8
        metered["quantize"] = (500_000, 2_000_000)
        assert lines(shows)[:2] == [
            # 24 s of quantize: three times as long as the quarter took; 2 s of compile by two workers; 5 s of qualify.
            "0/3 steps about 30 s left",
            "500 kB of 2 MB quantize",
        ]
        shows.ends("quantize", 1)
        assert lines(shows) == ["1/3 steps about 6 s left", "compile:a"]
    finally:
        shows.stop()
