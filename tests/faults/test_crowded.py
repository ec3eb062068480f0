"""Many builds and many writers at once."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from user_directory import UserDirectory

from furiosa_build.core.file_digests import HashMemory
from furiosa_build.store import Store, gc
from furiosa_build.store.blobs import Blobs

from .conftest import StartChild, assert_sound, build, forget

COMPILES = [
    f"compile:{bucket}:{kind}" for bucket in ("prefill-1x32", "decode-2x64") for kind in ("first", "block", "last")
]


def six_builds(user: UserDirectory, start_child: StartChild) -> Counter[str]:
    """How often each step did work, in six builds that all succeed."""
    children = [start_child(user) for _ in range(6)]
    results = [child.result() for child in children]
    assert [result for result in results if "error" in result] == []
    return Counter(step for result in results for step in result["ran"])


@pytest.mark.grid
def test_six_builds_at_once_do_every_step_once(fresh: UserDirectory, artifact_id: str, start_child: StartChild) -> None:
    times = six_builds(fresh, start_child)
    assert set(COMPILES) <= set(times)
    assert set(times.values()) == {1}
    assert_sound(fresh, artifact_id)


def test_two_recipes_at_once_do_what_they_share_once(
    fresh: UserDirectory, artifact_id: str, start_child: StartChild
) -> None:
    recipes = fresh.root / "recipes"
    (recipes / "twin.yaml").write_text((recipes / "tiny.yaml").read_text())
    results = [child.result() for child in [start_child(fresh, recipe=recipe) for recipe in ("tiny", "twin")]]
    assert [result for result in results if "error" in result] == []
    times = Counter(step for result in results for step in result["ran"])
    assert {step for step, count in times.items() if count > 1} == {"package", "qualify"}, "the name is in the artifact"
    assert set(COMPILES) <= set(times)
    assert_sound(fresh, artifact_id)


@pytest.mark.grid
def test_with_locks_that_do_nothing_the_result_is_right(
    fresh: UserDirectory, artifact_id: str, start_child: StartChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *_: None)
        assert set(COMPILES) <= set(six_builds(fresh, start_child))
    assert_sound(fresh, artifact_id)


def test_a_build_that_waits_says_for_whom_and_goes_on_when_that_is_killed(
    fresh: UserDirectory, artifact_id: str, start_child: StartChild, tmp_path: Path
) -> None:
    pipe, told = tmp_path / "pipe", tmp_path / "told"
    os.mkfifo(pipe)
    os.mkfifo(told)
    step = "compile:decode-2x64:block"
    first = start_child(fresh, fault=f"{step}@before-staging={pipe}")
    assert pipe.read_text() == f"{first.pid}\n"
    second = start_child(fresh, tell=told)
    message = told.read_text()
    assert message.startswith(f"{step}: waiting for process {first.pid} on ")
    first.kill()
    assert second.result()["ran"][0] == step
    assert_sound(fresh, artifact_id)


def test_gc_beside_a_build_removes_nothing_that_it_uses(
    user: UserDirectory, artifact_id: str, start_child: StartChild, tmp_path: Path
) -> None:
    """The other builds' steps go, however: those of another recipe."""
    build(user, "name=other", "quantization=int8")
    for name in ("pipe", "pipe.go"):
        os.mkfifo(tmp_path / name)
    forget(user, "package")
    child = start_child(user, fault=f"package@before-staging={tmp_path / 'pipe'}")
    assert (tmp_path / "pipe").read_text() == f"{child.pid}\n"
    collected = gc.collect(Store(user.store), max_size=0)
    steps = {entry.record.step for entry in collected.actions}
    assert {"quantize", "compile:decode-2x64:block"} <= steps
    (tmp_path / "pipe.go").write_text("go")
    # quantize shares a file with package, so it was forgotten as well; nobody had asked for qualify yet.
    assert child.result() == {"ran": ["quantize", "package", "qualify"]}
    assert_sound(user, artifact_id)


def test_a_hundred_writers_of_one_blob(tmp_path: Path) -> None:
    content, together = b"the same" * 1000, Barrier(100)
    sha256 = hashlib.sha256(content).hexdigest()

    def write(number: int) -> None:
        file = tmp_path / f"new-{number}"
        file.write_bytes(content)
        blobs = Blobs(tmp_path / "blobs", HashMemory(tmp_path / "hashes.sqlite"))
        together.wait()
        assert blobs.adopt(file) == (sha256, len(content))
        assert blobs.path(sha256).read_bytes() == content

    with ThreadPoolExecutor(100) as pool:
        list(pool.map(write, range(100)))
    assert [path.name for path in (tmp_path / "blobs").rglob("*") if path.is_file()] == [sha256]
    assert list(tmp_path.glob("new-*")) == []


def adopt_all(root: Path, numbers: range) -> bool:
    """By 16 threads; whether each is there afterwards."""
    blobs = Blobs(root / "blobs", HashMemory(root / "hashes.sqlite"))

    def adopt(number: int) -> bool:
        file = root / f"new-{number}"
        file.write_text(str(number))
        return blobs.holds(*blobs.adopt(file))

    with ThreadPoolExecutor(16) as pool:
        return all(pool.map(adopt, numbers))


def test_a_thousand_blobs_at_once(tmp_path: Path) -> None:
    """From four processes of 16 threads; whatever is remembered of them is right."""
    children = []
    for first in range(0, 1000, 250):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = 0 if adopt_all(tmp_path, range(first, first + 250)) else 2
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    found = {path.name: path for path in (tmp_path / "blobs").rglob("*") if path.is_file()}
    assert set(found) == {hashlib.sha256(str(number).encode()).hexdigest() for number in range(1000)}
    memory = HashMemory(tmp_path / "hashes.sqlite")
    assert [memory.recall(path) for path in found.values()] == list(found)
    assert list(tmp_path.glob("new-*")) == []
