"""`furiosa-build cache`: what a person sees, and the exit status."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from user_directory import Ran, UserDirectory, furiosa_build

from furiosa_build.core.canonical_json import digest
from furiosa_build.store import ActionResult, Store

DAY = 86400


@pytest.fixture
def user(tmp_path: Path) -> UserDirectory:
    """With a store of three steps of 1000 bytes each, `new`, `old` and `older`."""
    (tmp_path / "user").mkdir()
    store = Store(tmp_path / "store")

    def work(output: Path) -> ActionResult:
        (output / "f").write_text(output.name.ljust(1000))
        return ActionResult(seconds=2.5)

    for days, step in ((0, "new"), (10, "old"), (20, "older")):
        store.get_or_run(key(step), step, {"step": step}, work)
        used = time.time() - days * DAY - 60
        os.utime(manifest(tmp_path / "store", step), (used, used))
    store.close()
    return UserDirectory(tmp_path / "user", tmp_path / "store")


def key(step: str) -> str:
    return digest({"step": step})


def manifest(root: Path, step: str) -> Path:
    return root / "actions" / key(step)[:2] / key(step) / "manifest.json"


def cache(user: UserDirectory, *arguments: str) -> Ran:
    return furiosa_build(user, "cache", *arguments)


def steps(user: UserDirectory) -> list[str]:
    return [json.loads(line)["step"] for line in cache(user, "ls", "--json").out.splitlines()]


def test_ls(user: UserDirectory) -> None:
    status, out, err = cache(user, "ls")
    assert (status, err) == (0, "")
    *lines, total = out.splitlines()
    assert [line.split() for line in lines] == [
        [key("new")[:12], "new", "1", "kB", "1", "m"],
        [key("old")[:12], "old", "1", "kB", "1", "w"],
        [key("older")[:12], "older", "1", "kB", "3", "w"],
    ]
    assert total == f"3 steps, 3 kB in {user.store}"


def test_ls_for_machines(user: UserDirectory) -> None:
    building = Store(user.store)
    building.find(key("older"))
    found = [json.loads(line) for line in cache(user, "ls", "--json").out.splitlines()]
    building.close()
    assert [entry["step"] for entry in found] == ["older", "new", "old"]
    assert [entry["in_use"] for entry in found] == [True, False, False]
    assert set(found[0]) == {"key", "step", "bytes", "seconds", "last_used", "in_use"}
    assert (found[0]["key"], found[0]["bytes"], found[0]["seconds"]) == (key("older"), 1000, 2.5)


def test_ls_says_what_is_in_use(user: UserDirectory) -> None:
    building = Store(user.store)
    building.find(key("older"))
    lines = cache(user, "ls").out.splitlines()
    building.close()
    assert [line.endswith("in use") for line in lines] == [True, False, False, False]


def test_gc_without_options_removes_what_killed_builds_have_left(user: UserDirectory) -> None:
    (user.store / "sessions" / "1-killed").mkdir()
    ran = cache(user, "gc")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith("removed 0 steps and ")
    assert ran.out.endswith("; 3 kB stay\n")
    assert list((user.store / "sessions").iterdir()) == []
    assert steps(user) == ["new", "old", "older"]


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        (["--max-size", "2000"], ["older"]),
        (["--max-size", "1.9kB"], ["old", "older"]),
        (["--max-size", "1 KB"], ["old", "older"]),
        (["--max-size", "1.9KiB"], ["old", "older"]),
        (["--max-size", "0"], ["new", "old", "older"]),
        (["--max-size", "2TB"], []),
        (["--older-than", "2w"], ["older"]),
        (["--older-than", "216h"], ["old", "older"]),
        (["--older-than", "9.5d"], ["old", "older"]),
        (["--older-than", "30d"], []),
        (["--older-than", "2w", "--max-size", "1kb"], ["old", "older"]),
    ],
    ids=" ".join,
)
def test_gc_removes_what_was_not_used_for_longest(user: UserDirectory, options: list[str], gone: list[str]) -> None:
    would = cache(user, "gc", *options, "--dry-run")
    assert (would.status, would.err) == (0, "")
    assert steps(user) == ["new", "old", "older"]
    ran = cache(user, "gc", *options)
    assert ran.out == would.out.replace("would remove", "removed")
    *lines, summary = ran.out.splitlines()
    assert lines == [f"removed {key(step)[:12]}  {step}" for step in gone]
    assert summary.startswith(f"removed {len(gone)} steps and ")
    assert steps(user) == [step for step in ("new", "old", "older") if step not in gone]
    assert cache(user, "verify").status == 0


def test_what_a_build_uses_stays(user: UserDirectory) -> None:
    building = Store(user.store)
    building.find(key("older"))
    assert cache(user, "gc", "--max-size", "0", "--older-than", "0m").status == 0
    assert steps(user) == ["older"]
    building.close()


def test_verify(user: UserDirectory) -> None:
    assert cache(user, "verify") == (0, f"whole: 3 steps, 3 kB in {user.store}\n", "")
    (blob, *_) = sorted(user.store.glob("blobs/*/*"))
    blob.chmod(0o644)
    blob.write_bytes(b"x" + blob.read_bytes()[1:])
    manifest(user.store, "old").write_text("{")
    status, out, err = cache(user, "verify")
    assert (status, out) == (5, "")
    first, *findings = err.splitlines()
    assert first == f"error: the store {user.store} is damaged; the next build makes again what it needs"
    assert findings[0] == f"  {manifest(user.store, 'old')} is damaged"
    assert findings[1].startswith(f"  {blob} is damaged (")
    assert len(findings) == 2


@pytest.mark.parametrize("command", [["ls"], ["gc"], ["gc", "--max-size=0"], ["verify"]], ids=" ".join)
def test_a_store_that_is_not_there(user: UserDirectory, command: list[str]) -> None:
    nowhere = user.root / "no store"
    ran = cache(user, *command, "--cache-dir", str(nowhere))
    assert (ran.status, ran.err) == (0, "")
    assert "0 steps" in ran.out
    assert not nowhere.exists()


@pytest.mark.parametrize("command", ["ls", "gc", "verify"])
def test_a_store_that_is_no_directory(user: UserDirectory, command: str) -> None:
    file = user.root / "file"
    file.touch()
    ran = cache(user, command, "--cache-dir", str(file))
    assert ran == (2, "", f"error: the store is not a directory\n  where: {file}\n")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-size", "big"),
        ("--max-size", "-1"),
        ("--max-size", "1e9"),
        ("--max-size", "nan"),
        ("--max-size", "10 apples"),
        ("--max-size", ""),
        ("--older-than", "30"),
        ("--older-than", "1y"),
        ("--older-than", "-1d"),
        ("--older-than", "9" * 400 + "w"),
    ],
)
def test_values_that_make_no_sense(user: UserDirectory, option: str, value: str) -> None:
    status, out, err = cache(user, "gc", f"{option}={value}")
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert "is not understood" in err
    assert f"where: {option}" in err
    assert "valid: a number and " in err
    assert steps(user) == ["new", "old", "older"]


def test_what_cannot_be_removed_is_one_message(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("furiosa_build.store.gc.shutil.rmtree", refuse)
    status, _, err = cache(user, "gc", "--max-size", "0")
    assert status == 2
    assert err.startswith("error: what is there cannot be removed: [Errno 13] Permission denied: ")
