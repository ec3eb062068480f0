from __future__ import annotations

import io
from pathlib import Path

import pytest

from furiosa_build.core.events import CheckFinished, ErrorOccurred, SurveyStarted
from furiosa_build.ui.console import ConsoleLines, error_lines

from .scenes import FAILED, WELL


def test_lines_of_a_build(capsys: pytest.CaptureFixture[str]) -> None:
    listener = ConsoleLines()
    for event in WELL:
        listener(event)
    assert capsys.readouterr().out == (
        "KV cache: 8 blocks\n"
        "[2/3] quantize                                 1.2 s      2 MB\n"
        "[3/3] package                                found in the store, published again\n"
        "ran 1 of 3 steps in 4.0 s, 2 up to date\n"
    )


def test_a_listener_counts_each_build_anew() -> None:
    lines: list[str] = []
    listener = ConsoleLines(lines.append)
    for event in (*WELL, *WELL):
        listener(event)
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]


def test_a_build_that_fails_has_its_error_on_the_other_stream(capsys: pytest.CaptureFixture[str]) -> None:
    listeners = ConsoleLines(), error_lines()
    for event in FAILED:
        for listener in listeners:
            listener(event)
    out, err = capsys.readouterr()
    assert out == "0 steps ran, kept in the store; the next build goes on from there\n"
    assert err == "error: step fetch failed: why\n  log: there\n"


def test_a_bug_shows_its_traceback() -> None:
    stream = io.StringIO()
    error_lines(stream)(ErrorOccurred(message="step x failed: KeyError: 1", status=3, traceback="Traceback ...\n"))
    assert stream.getvalue() == "Traceback ...\nerror: step x failed: KeyError: 1\n"


def test_that_a_model_is_surveyed_is_for_who_waits_at_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file, terminal = io.StringIO(), Terminal()
    for stream in (file, terminal):
        error_lines(stream)(SurveyStarted())
    assert file.getvalue() == ""
    assert terminal.getvalue() == "surveying the model's layers: once for an architecture, some seconds\n"


@pytest.mark.parametrize(
    ("differing", "out", "err"),
    [
        ((), "the same bytes in every file\n", ""),
        (("a differs", "b differs"), "", "error: built again, /out/v is not the same:\n  a differs\n  b differs\n"),
    ],
)
def test_a_check(capsys: pytest.CaptureFixture[str], differing: tuple[str, ...], out: str, err: str) -> None:
    event = CheckFinished(directory=Path("/out/v"), differing=differing)
    ConsoleLines()(event)
    error_lines()(event)
    assert capsys.readouterr() == (out, err)
