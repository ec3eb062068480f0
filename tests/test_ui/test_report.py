"""What a build writes of itself: the facts, as JSON and as a page that needs nothing else."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from user_directory import UserDirectory, furiosa_build, make_built_directory, steps_in_this_process

from furiosa_build.build.build import Build


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    return make_built_directory(tmp_path_factory.mktemp("report"))


class Page(HTMLParser):
    """All text, and every attribute that could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.loads = "", []  # type: ignore[var-annotated]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [(tag, name) for name, _ in attrs if name in ("src", "href")] + [tag] * (tag == "script")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_says_what_ran_and_what_was_there(built: UserDirectory) -> None:
    with steps_in_this_process():
        ran = furiosa_build(built, "build", "tiny", "buckets.decode_buckets=[[2,64],[3,64]]", "name=two")
    assert ran.status == 0
    directory = (built.root / "artifacts" / "two" / "latest").resolve()
    report = json.loads(Path(f"{directory}.build-report.json").read_text())
    states = {one["step"]: one["state"] for one in report["steps"]}
    expected = {f"{step}:decode-3x64:{k}" for step in ("partition", "compile") for k in ("first", "block", "last")}
    assert {step for step, state in states.items() if state == "ran"} == expected | {"package", "qualify"}
    assert {state for step, state in states.items() if step not in expected | {"package", "qualify"}} == {"up to date"}
    assert all(one["begin"] <= one["end"] for one in report["steps"] if one["state"] == "ran")
    assert report["qualification"] == json.loads(Path(f"{directory}.qualify.json").read_text())
    assert report["qualified"].startswith("52 tokens, top-1 agreement 100%")
    assert report["sizes"]["all"] == sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())

    page = Page()
    page.feed(Path(f"{directory}.build-report.html").read_text())
    assert page.loads == []
    assert all(step in page.text for step in states)
    assert report["qualified"] in page.text


def test_a_build_that_does_nothing_writes_no_report(built: UserDirectory) -> None:
    assert furiosa_build(built, "build", "tiny").status == 0
    assert list(built.artifacts.glob("*.build-report.*")) == []


def test_events_one_a_line(built: UserDirectory) -> None:
    with steps_in_this_process():
        ran = furiosa_build(built, "build", "tiny", "name=three", "--json")
    events = [json.loads(line) for line in ran.out.splitlines()]
    assert [event["event"] for event in events] == [
        "build-begun",
        "message",  # that the model has no tokenizer
        *["step-begun", "step-ended"] * 2,
        "message",
        "build-ended",
    ]
    assert [event["step"] for event in events if event["event"] == "step-ended"] == ["package", "qualify"]
    assert events[-1]["status"] == 0
    assert events[-1]["ran"] == 2


def test_an_error_is_an_event_as_well(built: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FURIOSA_BUILD_FAULT", "package@before-staging=errno:ENOSPC")
    ran = furiosa_build(built, "build", "tiny", "name=four", "--json")
    assert ran.status == 3
    events = [json.loads(line) for line in ran.out.splitlines()]
    assert events[-1]["event"] == "build-ended"
    assert events[-1]["status"] == 3
    assert "No space left" in next(event["message"] for event in events if event["event"] == "error")


@pytest.mark.parametrize("command", ["plan", "explain"])
def test_notes_do_not_get_between_the_lines_of_json(
    built: UserDirectory, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Such as that the store cannot be written."""
    is_done = Build.is_done

    def is_done_with_a_note(self: Build, *step: Any) -> bool:
        self.store.notify("a note")
        return is_done(self, *step)

    monkeypatch.setattr(Build, "is_done", is_done_with_a_note)
    ran = furiosa_build(built, command, "tiny", "--json")
    assert (ran.status, ran.err) == (0, "")
    assert all(isinstance(json.loads(line), dict) for line in ran.out.splitlines())


def test_explain_names_the_factor(built: UserDirectory) -> None:
    """From what to what; as text and as JSON."""
    ran = furiosa_build(built, "explain", "tiny")
    assert ran.out.splitlines()[-1] == "17 of 17 steps are up to date"
    ran = furiosa_build(built, "explain", "tiny", "scheduler.max_processing_samples=7")
    assert "scheduler.max_processing_samples changed: 65536 -> 7" in ran.out
    found = [
        json.loads(line)
        for line in furiosa_build(built, "explain", "tiny", "quantization=int8", "--json").out.splitlines()
    ]
    states = {one["step"]: one["state"] for one in found}
    assert states["fetch"] == "up to date"
    assert states["quantize"] == "to do"
    assert states["package"] == "to do", "the artifact tells the scheme"
    assert states["qualify"] == "to do"
    assert states["partition:decode-2x64:first"] == "up to date"
    [quantize] = [one for one in found if one["step"] == "quantize"]
    places = {tuple(change["place"][:2]) for change in quantize["changes"]}
    assert ("reads", "schemes") in places
    assert ("source", "furiosa_build.quant.int8") in places
