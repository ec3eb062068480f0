"""Whatever is wrong with a file of the store is a miss: the next build makes it again, and the artifact is right."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from user_directory import UserDirectory, furiosa_build

from furiosa_build.store import Store, gc

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


def blob_of(user: UserDirectory, step: str) -> Path:
    store = Store(user.store)
    record = next(record for record, _, _ in store.records() if record.step == step)
    return store.path(next(iter(record.outputs.values())))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("step", ["fetch", "partition:weights", STEP, "package"])
def test_a_damaged_blob_is_named_and_made_again(user: UserDirectory, artifact_id: str, damage: str, step: str) -> None:
    path = blob_of(user, step)
    DAMAGES[damage](path)
    ran = furiosa_build(user, "cache", "verify")
    assert ran.status == 5
    assert str(path) in ran.err
    assert step in build(user)
    assert_sound(user, artifact_id)


def test_swapped_blobs_are_both_made_again(user: UserDirectory, artifact_id: str) -> None:
    one, other = blob_of(user, STEP), blob_of(user, "compile:prefill-1x32:block")
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    assert len(list(gc.verify(Store(user.store)))) == 2
    assert {STEP, "compile:prefill-1x32:block"} <= set(build(user))
    assert_sound(user, artifact_id)


@pytest.mark.parametrize("content", [b"", b"{", b'{"key": 1}', b"\xff" * 100])
@pytest.mark.parametrize("file", ["manifest.json", "key_factors.json"])
def test_garbage_for_an_action(user: UserDirectory, artifact_id: str, file: str, content: bytes) -> None:
    for path in user.store.glob(f"actions/*/*/{file}"):
        path.write_bytes(content)
    ran = build(user)
    assert bool(ran) == (file == "manifest.json")
    if file == "manifest.json":
        assert_sound(user, artifact_id)


def test_garbage_for_the_memory_of_hashes(user: UserDirectory, artifact_id: str) -> None:
    (user.store / "hashes.sqlite").write_bytes(b"no database" * 1000)
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
