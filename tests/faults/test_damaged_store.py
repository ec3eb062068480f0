"""Whatever is wrong with a file of the store is a miss: the next build makes it again, and the artifact is right."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from grid import grid
from user_directory import UserDirectory, furiosa_build, run

from furiosa_build.store import ActionRecord, Store, gc

from .conftest import assert_sound, build

STEP = "compile:decode-2x64:block"


def overwrite(path: Path, content: bytes) -> None:
    """In place, later than it was written."""
    path.chmod(0o644)
    later = path.stat().st_mtime_ns + 1
    path.write_bytes(content)
    os.utime(path, ns=(later, later))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    overwrite(path, bytes(content))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "emptied": lambda path: overwrite(path, b""),
    "one byte": lambda path: overwrite(path, path.read_bytes()[:1]),
    "cut short": lambda path: overwrite(path, path.read_bytes()[:-1]),
    "a byte flipped": flip,
    "missing": Path.unlink,
}


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def record_of(user: UserDirectory, step: str) -> ActionRecord:
    return next(record for record, _, _ in Store(user.store).records() if record.step == step)


def action_of(user: UserDirectory, step: str) -> Path:
    key = record_of(user, step).key
    return user.store / "actions" / key[:2] / key


def blob_of(user: UserDirectory, step: str) -> Path:
    return Store(user.store).path(next(iter(record_of(user, step).outputs.values())))


@pytest.mark.parametrize(
    ("damage", "step"),
    grid(
        itertools.product(DAMAGES, ["fetch", "partition:weights", STEP, "package"]),
        [("missing", "fetch"), ("cut short", "partition:weights"), ("a byte flipped", STEP), ("emptied", "package")],
    ),
)
def test_a_damaged_blob_is_named_and_made_again(user: UserDirectory, artifact_id: str, damage: str, step: str) -> None:
    path = blob_of(user, step)
    DAMAGES[damage](path)
    said = furiosa_build(user, "cache", "verify")
    assert said.status == 5
    assert str(path) in said.err
    assert step in build(user)
    assert_sound(user, artifact_id)


def test_swapped_blobs_are_both_made_again(user: UserDirectory, artifact_id: str) -> None:
    one, other = blob_of(user, STEP), blob_of(user, "compile:prefill-1x32:block")
    swap(one, other)
    assert len(list(gc.verify(Store(user.store)))) == 2
    assert {STEP, "compile:prefill-1x32:block"} <= set(build(user))
    assert_sound(user, artifact_id)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["manifest.json", "key_factors.json"])
def test_a_damaged_action_is_named_and_made_again(
    user: UserDirectory, artifact_id: str, file: str, damage: str
) -> None:
    path = action_of(user, STEP) / file
    DAMAGES[damage](path)
    said = furiosa_build(user, "cache", "verify")
    if (file, damage) == ("manifest.json", "missing"):
        assert said.status == 0, "nothing is left that says that it was there"
    else:
        assert said.status == 5
        assert str(path) in said.err
    assert build(user) == [STEP]
    assert_sound(user, artifact_id)


def test_swapped_actions_are_both_made_again(user: UserDirectory, artifact_id: str) -> None:
    one, other = action_of(user, STEP), action_of(user, "compile:prefill-1x32:block")
    swap(one, other)
    assert len(list(gc.verify(Store(user.store)))) == 2
    assert sorted(build(user)) == sorted([STEP, "compile:prefill-1x32:block"])
    assert_sound(user, artifact_id)


def test_garbage_everywhere(user: UserDirectory, artifact_id: str) -> None:
    """Of the store nothing is left but names."""
    for path in [path for path in user.store.rglob("*") if path.is_file()]:
        overwrite(path, b"\xff garbage \x00" * 10)
    with closing(user.open()) as opened:
        assert run(opened) == list(opened.plan.steps)
    assert_sound(user, artifact_id)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_the_memory_of_hashes_makes_no_difference(user: UserDirectory, artifact_id: str, damage: str) -> None:
    DAMAGES[damage](user.store / "hashes.sqlite")
    assert build(user) == []
    assert_sound(user, artifact_id)


def test_damage_that_keeps_size_and_time_is_found_when_inputs_are_verified(
    user: UserDirectory, artifact_id: str
) -> None:
    assert build(user) == [], "every blob has been read"
    path = blob_of(user, STEP)
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert build(user) == [], "the limit that docs/cache.md states"
    assert build(user, "verify_inputs=true") == [STEP]
    assert_sound(user, artifact_id)
