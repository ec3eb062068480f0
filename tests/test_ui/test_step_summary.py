from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_build.cli import running
from furiosa_build.core.events import BuildFinished, ErrorOccurred, Event
from furiosa_build.ui.step_summary import VARIABLE, StepSummary

from .scenes import FAILED, INTERRUPTED, STARTED, WELL, done

TABLE = "| step | time | peak memory | output |\n|---|---:|---:|---:|\n"


def written(path: Path, *events: Event) -> str:
    listener = StepSummary(path)
    for event in events:
        listener(event)
    return path.read_text()


def test_a_build_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    assert written(path, *WELL) == (
        "before\n"
        "## tiny: built\n\n"
        "`/out/tiny/1d19a46d5a63`\n\n"
        "1 step ran in 4 s, 2 up to date.\n\n"
        f"{TABLE}| `quantize` | 1.2 s | 2 MB | 1.5 kB |\n\n"
    )


def test_an_error_cannot_leave_its_block(tmp_path: Path) -> None:
    assert written(tmp_path / "a.md", *FAILED) == (
        "## tiny: exit status 3\n\n"
        "0 steps ran in 4 s, 0 up to date.\n\n"
        "````text\nstep fetch failed: why\n  log: there\n````\n\n\n"
    )
    hostile = ErrorOccurred(message="````\n<script>", status=3)
    assert "\n````\n<script>" not in written(tmp_path / "b.md", STARTED, hostile, FAILED[-1])


def test_an_interrupt(tmp_path: Path) -> None:
    assert "Interrupted by SIGTERM." in written(tmp_path / "a.md", *INTERRUPTED)


def test_it_stays_small(tmp_path: Path) -> None:
    steps = [done(f"compile:decode-{n}x128:block", "ran", seconds=n) for n in range(20_000)]
    finished = BuildFinished(status=3, ran=20_000, up_to_date=0, seconds=1.0)
    error = ErrorOccurred(message="x" * 2**20, status=3)
    text = written(tmp_path / "a.md", STARTED, *steps, error, finished)
    assert len(text) < 2**16
    assert "| `compile:decode-19999x128:block` |" in text, "the slowest are listed"
    assert text.endswith("\nand 19800 steps that took less time\n\n")


def test_a_file_that_cannot_be_written_ends_no_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listener = StepSummary(tmp_path / "nowhere" / "summary.md")
    for event in WELL:
        listener(event)
    assert capsys.readouterr().err.startswith("the summary cannot be written: ")


def test_commands_write_it_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not [each for each in running.listeners() if isinstance(each, StepSummary)]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "summary.md"))
    for as_json in (False, True):
        [summary] = [each for each in running.listeners(as_json) if isinstance(each, StepSummary)]
        for event in WELL:
            summary(event)
    assert (tmp_path / "summary.md").read_text().count("## tiny: built") == 2
    monkeypatch.setenv(VARIABLE, "")
    assert not [each for each in running.listeners() if isinstance(each, StepSummary)]
