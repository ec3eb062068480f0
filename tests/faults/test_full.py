"""Disks that are full, stores that cannot be written, other file systems, other masks, other letters."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from contextlib import closing
from pathlib import Path

import pytest
from grid import grid
from user_directory import UserDirectory, furiosa_build, make_user_directory

from furiosa_build.core import failpoints
from furiosa_build.core.errors import BuildError, StepError
from furiosa_build.store import actions

from .conftest import assert_sound, build, forget
from .test_killed import BEFORE, PUBLISHING, STEPS


# Each step writes in its own way; what comes after that is the same for all.
@pytest.mark.parametrize(
    ("step", "point"),
    grid(
        [*((step, "mid-write") for step in STEPS), *(("quantize", point) for point in BEFORE if point != "mid-write")],
        [("fetch", "mid-write"), ("quantize", "after-fsync"), ("package", "mid-write"), ("qualify", "mid-write")],
    ),
)
def test_a_full_disk_makes_the_step_fail_and_the_next_build_repeats_it(
    user: UserDirectory, artifact_id: str, monkeypatch: pytest.MonkeyPatch, step: str, point: str
) -> None:
    forget(user, step)
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, f"{step}@{point}=errno:ENOSPC")
        with pytest.raises(StepError, match=rf"step {step} failed: OSError: .*No space left on device"):
            build(user)
    assert build(user) == [step]
    assert_sound(user, artifact_id)


@pytest.mark.parametrize("point", [*PUBLISHING[:2], "before-latest"])
def test_a_full_disk_leaves_nothing_half_published(
    user: UserDirectory, artifact_id: str, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    shutil.rmtree(user.artifacts)
    step = "qualify" if point == "before-latest" else "package"
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, f"{step}@{point}=errno:ENOSPC")
        with pytest.raises(StepError, match=f"step {step} failed"):
            build(user)
    assert not (user.artifacts / "latest").exists()
    if step == "package":
        assert list(user.artifacts.iterdir()) == []
    assert build(user) == []
    assert_sound(user, artifact_id)


def test_a_full_disk_is_one_message_and_status_3(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(user, "package")
    monkeypatch.setenv(failpoints.VARIABLE, "package@mid-write=errno:ENOSPC")
    ran = furiosa_build(user, "build", "tiny")
    assert ran.status == 3
    assert ran.err.startswith("error: step package failed: OSError: [Errno 28] No space left on device")
    assert "Traceback" not in ran.err


def _build_limited(user: UserDirectory, limit: int) -> None:
    """Never returns; the exit status is that of the error."""
    status = 0
    try:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as Python does when it starts
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        build(user)
    except BuildError as error:
        status = error.exit_status
    except BaseException:
        status = 99
    finally:
        os._exit(status)


@pytest.mark.parametrize("limit", grid([0, 300, 4096, 20_000], [300]))
def test_files_that_may_not_grow(fresh: UserDirectory, artifact_id: str, limit: int) -> None:
    """A real limit, wherever it strikes: in a staged file, in the memory of hashes, in a manifest."""
    pid = os.fork()
    if pid == 0:
        _build_limited(fresh, limit)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == StepError.exit_status
    build(fresh)
    assert_sound(fresh, artifact_id)


def contents(store: Path) -> dict[Path, int]:
    """When what counts was written. The two others only a real refusal keeps from being written."""
    others = ("hashes.sqlite", "gc.lock")
    return {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.name not in others}


def test_a_store_that_cannot_be_written_is_used_and_left_as_it_is(
    user: UserDirectory, artifact_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the system answers: this may run as root, who may write anything."""
    access = os.access

    def refuse(path: Path, mode: int) -> bool:
        return user.store not in (Path(path), *Path(path).parents) and access(path, mode)

    monkeypatch.setattr(actions.os, "access", refuse)
    forget(user, "compile:decode-2x64:block")
    before = contents(user.store)
    told: list[str] = []
    with closing(user.open("save_dir=elsewhere")) as opened:
        opened.store.notify = told.append
        ran = [name for name in opened.plan.steps if not opened.is_done(name) and opened.run(name).ran]
        assert ran == ["compile:decode-2x64:block"]
        assert opened.version_directory.name == artifact_id[:12]
    another = "cache_dir or FURIOSA_BUILD_CACHE names another"
    assert told == [f"the store {user.store} cannot be written: what is built is not kept there; {another}"]
    assert contents(user.store) == before
    assert sorted(path.name for path in (user.root / "elsewhere").iterdir()) == ["tiny"]


def test_another_mask_gives_the_same_artifact(fresh: UserDirectory, artifact_id: str) -> None:
    before = os.umask(0o077)
    try:
        build(fresh)
    finally:
        os.umask(before)
    assert_sound(fresh, artifact_id)


def test_spaces_and_letters(tmp_path: Path, built: UserDirectory, artifact_id: str) -> None:
    user = make_user_directory(tmp_path / "ein Verzeichnis ü", tmp_path / "der Speicher 箱", built.root / "tiny")
    build(user, "save_dir='die Ausgabe é'")
    latest = user.root / "die Ausgabe é" / "tiny" / "latest"
    assert latest.readlink() == Path(artifact_id[:12])


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no second file system")
def test_store_and_output_on_different_file_systems(user: UserDirectory, artifact_id: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        assert build(user, f"save_dir='{elsewhere}'") == []
        assert build(user, f"save_dir='{elsewhere}'") == []
        latest = Path(elsewhere) / "tiny" / "latest"
        assert latest.readlink() == Path(artifact_id[:12])
        program = next((latest / "programs").iterdir())
        program.chmod(0o644)
        program.write_bytes(program.read_bytes()[::-1])
        assert build(user, f"save_dir='{elsewhere}'") == [], "healed from the store"
