"""`build --check`: what is built again without the store is the same, or every file that differs is named."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from user_directory import UserDirectory, furiosa_build, make_new_directory, steps_in_this_process

from furiosa_build.backends.eager import EagerBackend
from furiosa_build.build.reproduce import differing_files


@pytest.fixture
def user(tmp_path: Path) -> UserDirectory:
    return make_new_directory(tmp_path)


def test_a_build_that_is_reproducible_passes_and_leaves_nothing_behind(
    user: UserDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with steps_in_this_process():
        ran = furiosa_build(user, "build", "tiny", "--check")
    assert (ran.status, ran.err) == (0, "")
    assert "building again, without the store\n" in ran.out
    assert ran.out.endswith("the same bytes in every file\n")
    assert [path for path in temporary.iterdir() if "check" in path.name] == []


@pytest.mark.grid
@pytest.mark.parametrize("status", [0, 5])
def test_with_json_there_are_events_and_nothing_else(
    user: UserDirectory, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    differing = ["programs/a differs"] if status else []
    monkeypatch.setattr("furiosa_build.build.reproduce.differing_files", lambda *_: differing)
    with steps_in_this_process():
        ran = furiosa_build(user, "build", "tiny", "--check", "--json")
    assert ran.status == status
    events = [json.loads(line) for line in ran.out.splitlines()]
    ended = [event["event"] for event in events if event["event"].endswith(("begun", "ended"))]
    assert [name for name in ended if not name.startswith("step")] == ["build-begun", "build-ended"] * 2 + [
        "check-ended"
    ]
    assert {"message": "building again, without the store"} in [{event["event"]: event.get("text")} for event in events]
    assert (events[-1]["status"], events[-1]["differing"]) == (status, differing)


def test_a_bug_is_told_apart_from_the_events(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("furiosa_build.steps.fetch.Fetch.run", broken)
    with steps_in_this_process():
        ran = furiosa_build(user, "build", "tiny", "--json")
    assert ran.status == 3
    assert "ZeroDivisionError" in ran.err
    assert json.loads(ran.out.splitlines()[-1])["status"] == 3
    assert all(json.loads(line)["event"] for line in ran.out.splitlines())


def test_files_that_differ_are_named(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_graph, count = EagerBackend.compile, itertools.count()

    def compile_with_a_counter(self: EagerBackend, graph: Any, output: Path, *rest: Any) -> None:
        compile_graph(self, graph, output, *rest)
        output.write_bytes(output.read_bytes() + b" " * next(count))

    monkeypatch.setattr(EagerBackend, "compile", compile_with_a_counter)
    with steps_in_this_process():
        ran = furiosa_build(user, "build", "tiny", "--check")
    assert ran.status == 5
    message, *named = ran.err.splitlines()
    assert message == f"error: built again, {(user.artifacts / 'latest').resolve()} is not the same:"
    programs = sorted(path.name for path in (user.artifacts / "latest" / "programs").iterdir())
    assert [line.split()[0] for line in named if "programs/" in line] == [f"programs/{name}" for name in programs]
    assert not [line for line in named if "params/" in line or "model/" in line]


def test_files_of_one_side_only_are_named(tmp_path: Path) -> None:
    for name, files in {"a": ("same", "deep/one", "other"), "b": ("same", "two", "other")}.items():
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(name if file == "other" else "x")
    assert differing_files(tmp_path / "a", tmp_path / "b") == [
        "deep/one is only in the first build",
        "other differs",
        "two is only in the second build",
    ]
