"""kill -9 at every point of every step: the next build repeats that step alone, and the artifact is the same."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
from grid import grid
from user_directory import UserDirectory

from furiosa_build.store import Store

from .conftest import StartChild, assert_sound, build, forget

STEPS = [
    "fetch",
    "quantize",
    "partition:weights",
    *(f"{step}:decode-2x64:{kind}" for kind in ("first", "block", "last") for step in ("partition", "compile")),
    "package",
    "qualify",
]
BEFORE = ["before-staging", "mid-write", "after-fsync", "before-rename"]
EVERY_POINT = [("compile:decode-2x64:block", point) for point in [*BEFORE, "after-rename"]]
PUBLISHING = ["mid-publish", "before-publish", "after-publish"]


def kill_at(user: UserDirectory, start_child: StartChild, pipe: Path, step: str, point: str) -> None:
    os.mkfifo(pipe)
    child = start_child(user, fault=f"{step}@{point}={pipe}")
    assert pipe.read_text() == f"{child.pid}\n"
    child.kill()


def steps_kept(user: UserDirectory) -> set[str]:
    return {record.step for record, _, _ in Store(user.store).records()}


@pytest.mark.parametrize(
    ("step", "point"),
    grid(itertools.product(STEPS, [*BEFORE, "after-rename"]), [*itertools.product(STEPS, ["mid-write"]), *EVERY_POINT]),
)
def test_a_step_that_is_killed_is_repeated_alone(
    user: UserDirectory, artifact_id: str, start_child: StartChild, tmp_path: Path, step: str, point: str
) -> None:
    forget(user, step)
    kill_at(user, start_child, tmp_path / "pipe", step, point)
    assert build(user) == ([step] if point in BEFORE else [])
    assert_sound(user, artifact_id)


@pytest.mark.parametrize("point", grid([*BEFORE, "after-rename"], ["before-rename", "after-rename"]))
def test_a_survey_that_is_killed_is_made_again(
    user: UserDirectory, artifact_id: str, start_child: StartChild, tmp_path: Path, point: str
) -> None:
    """Before there is a plan."""
    forget(user, "survey")
    kill_at(user, start_child, tmp_path / "pipe", "survey", point)
    assert ("survey" in steps_kept(user)) == (point == "after-rename")
    assert build(user) == []
    assert "survey" in steps_kept(user)
    assert_sound(user, artifact_id)


@pytest.mark.parametrize("point", PUBLISHING)
def test_publishing_that_is_killed_is_done_again(
    user: UserDirectory, artifact_id: str, start_child: StartChild, tmp_path: Path, point: str
) -> None:
    shutil.rmtree(user.artifacts)
    kill_at(user, start_child, tmp_path / "pipe", "package", point)
    assert not (user.artifacts / "latest").exists()
    assert build(user) == []
    assert_sound(user, artifact_id)


def test_latest_moves_whole(user: UserDirectory, artifact_id: str, start_child: StartChild, tmp_path: Path) -> None:
    (user.artifacts / "latest").unlink()
    kill_at(user, start_child, tmp_path / "pipe", "qualify", "before-latest")
    assert not (user.artifacts / "latest").is_symlink()
    assert build(user) == []
    assert_sound(user, artifact_id)


def test_a_first_build_goes_on_where_it_was_killed(
    fresh: UserDirectory, artifact_id: str, start_child: StartChild, tmp_path: Path
) -> None:
    kill_at(fresh, start_child, tmp_path / "pipe", "compile:decode-2x64:block", "mid-write")
    ran = build(fresh)
    assert ran == [
        "compile:decode-2x64:block",
        "partition:decode-2x64:last",
        "compile:decode-2x64:last",
        "package",
        "qualify",
    ]
    assert_sound(fresh, artifact_id)
