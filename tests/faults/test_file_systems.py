"""Real file systems that are full or sealed, in a mount namespace of a child's own; and a user who may write little."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import shutil
import subprocess
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from user_directory import UserDirectory, furiosa_build, make_user_directory, run

from furiosa_build.core.errors import StepError
from furiosa_build.store import Store, gc

from .conftest import build, forget

NEW_MOUNTS = 0x00020000
ANOTHER = "cache_dir or FURIOSA_BUILD_CACHE names another"
NOBODY = 65534
STEP = "compile:decode-2x64:block"
Facts = dict[str, Any]


class NotPermittedHere(Exception):  # noqa: N818
    """A test cannot be made."""


def in_child(work: Callable[[], Facts], output: Path) -> Facts:
    """What `work` returns, in a process that ends with it. What is not permitted is skipped."""
    output.touch()
    output.chmod(0o666)
    child = os.fork()
    if child == 0:
        try:
            output.write_text(json.dumps(work()))
        except NotPermittedHere as error:
            output.write_text(json.dumps({"skip": str(error)}))
        except BaseException:
            output.write_text(json.dumps({"failed": traceback.format_exc()}))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    facts: Facts = json.loads(output.read_text())
    if "skip" in facts:
        pytest.skip(facts["skip"])
    assert "failed" not in facts, facts["failed"]
    return facts


def mount(*arguments: str) -> None:
    ran = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise NotPermittedHere(f"mounting: {ran.stderr.strip()}")


def with_mounts_of_its_own() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS) != 0:
        raise NotPermittedHere(f"mounting: {os.strerror(ctypes.get_errno())}")
    mount("--make-rprivate", "/")


def failure(user: UserDirectory, *overrides: str) -> str:
    """The message of a build that fails in a step."""
    with pytest.raises(StepError) as caught:
        build(user, *overrides)
    return str(caught.value)


def told_by(user: UserDirectory, *overrides: str) -> Facts:
    """A build: the steps that ran, what it said of the store, and where the artifact is."""
    told: list[str] = []
    with closing(user.open(*overrides)) as opened:
        opened.store.notify = told.append
        return {"ran": run(opened), "told": told, "version": opened.version_directory.name}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_a_small_file_system_for_the_store(
    fresh: UserDirectory, built: UserDirectory, artifact_id: str, tmp_path: Path, share: float
) -> None:
    """Full wherever it is: among blobs, manifests, sessions, or in the memory of hashes."""
    pages = sum(-(-path.stat().st_size // 4096) for path in built.store.rglob("*") if path.is_file())

    def work() -> Facts:
        with_mounts_of_its_own()
        fresh.store.mkdir()
        mount("-t", "tmpfs", "-o", f"size={4096 * max(1, int(share * pages))}", "tmpfs", str(fresh.store))
        message = failure(fresh)
        whole = list(gc.verify(Store(fresh.store)))
        mount("-o", "remount,size=100m", str(fresh.store))
        build(fresh)
        gc.collect(Store(fresh.store))
        left = [*fresh.store.glob("sessions/*"), *fresh.store.rglob(".*")]
        found = fresh.latest().metadata.artifact_id
        return {"message": message, "findings": whole, "left": [str(path) for path in left], "artifact": found}

    facts = in_child(work, tmp_path / "facts")
    assert facts["message"].startswith("step ")
    assert "No space left on device" in facts["message"]
    assert (facts["findings"], facts["left"], facts["artifact"]) == ([], [], artifact_id)


def test_a_small_file_system_for_the_artifact(user: UserDirectory, artifact_id: str, tmp_path: Path) -> None:
    place = user.root / "small"

    def work() -> Facts:
        with_mounts_of_its_own()
        place.mkdir()
        mount("-t", "tmpfs", "-o", "size=40k", "tmpfs", str(place))
        message = failure(user, "save_dir=small")
        left = [path.name for path in place.rglob("*")]
        mount("-o", "remount,size=100m", str(place))
        ran = build(user, "save_dir=small")
        return {"message": message, "left": left, "ran": ran, "latest": str((place / "tiny" / "latest").readlink())}

    facts = in_child(work, tmp_path / "facts")
    assert facts["message"].startswith("step package failed: OSError: [Errno 28] No space left on device")
    assert facts["left"] == ["tiny"]
    assert facts["ran"] == []
    assert facts["latest"] == artifact_id[:12]


def check_used_as_it_is(user: UserDirectory, facts: Facts, artifact_id: str) -> None:
    """A hit is a hit; what is missing is made, and not kept in the store."""
    assert facts["ran"] == [STEP]
    assert facts["told"] == [f"the store {user.store} cannot be written: what is built is not kept there; {ANOTHER}"]
    assert facts["version"] == artifact_id[:12]
    assert [path.name for path in (user.root / "elsewhere").iterdir()] == ["tiny"], "the substitute is gone"
    assert (user.root / "elsewhere" / "tiny" / "latest").readlink() == Path(artifact_id[:12])


def test_a_store_on_a_read_only_file_system(user: UserDirectory, artifact_id: str, tmp_path: Path) -> None:
    forget(user, STEP)
    before = {path: path.stat().st_mtime_ns for path in user.store.rglob("*")}

    def work() -> Facts:
        with_mounts_of_its_own()
        mount("--bind", str(user.store), str(user.store))
        mount("-o", "remount,ro,bind", str(user.store))
        return told_by(user, "save_dir=elsewhere")

    check_used_as_it_is(user, in_child(work, tmp_path / "facts"), artifact_id)
    assert {path: path.stat().st_mtime_ns for path in user.store.rglob("*")} == before


@pytest.fixture
def open_to_all(user: UserDirectory) -> Iterator[UserDirectory]:
    """A copy where everyone may go: pytest's own directories are closed to other users."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        root = Path(name)
        root.chmod(0o755)
        shutil.copytree(user.root, root / "user", symlinks=True)
        shutil.copytree(user.store, root / "store")
        (root / "user" / "tiny" / "model.safetensors").chmod(0o644)
        yield UserDirectory(root / "user", root / "store")


def become_another_user(store: Path) -> None:
    """Who may read the store and write nothing there. Only root can; for anybody else the store is sealed."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    else:
        for path in (store, *store.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)


def test_the_store_of_another_user(open_to_all: UserDirectory, artifact_id: str) -> None:
    user = open_to_all
    forget(user, STEP)
    user.root.chmod(0o777)
    before = {path: path.stat().st_mtime_ns for path in user.store.rglob("*")}

    def work() -> Facts:
        become_another_user(user.store)
        return told_by(user, "save_dir=elsewhere")

    check_used_as_it_is(user, in_child(work, user.store.parent / "facts"), artifact_id)
    assert {path: path.stat().st_mtime_ns for path in user.store.rglob("*")} == before


@pytest.fixture(scope="module")
def _imported(built: UserDirectory, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What commands import: another user may not be allowed to read it."""
    importlib.import_module("furiosa_build.build.export_shards")
    root = tmp_path_factory.mktemp("warm")
    shutil.copytree(built.store, root / "store")
    warm = make_user_directory(root / "user", root / "store", built.root / "tiny")
    forget(warm, STEP)
    for flag in ("--json", "--verify-inputs"):
        assert furiosa_build(warm, "build", "tiny", flag).status == 0


@pytest.mark.usefixtures("_imported")
@pytest.mark.parametrize(("lacks", "flag"), [([], ""), ([STEP], ""), ([STEP], "--json")])
def test_the_command_works_to_its_end_without_a_store_to_write_to(
    open_to_all: UserDirectory, artifact_id: str, lacks: list[str], flag: str
) -> None:
    user = open_to_all
    for step in lacks:
        forget(user, step)
    user.root.chmod(0o777)

    def work() -> Facts:
        become_another_user(user.store)
        ran = furiosa_build(user, "build", "tiny", "save_dir=elsewhere", *flag.split())
        return {"ran": ran, "latest": str((user.root / "elsewhere" / "tiny" / "latest").readlink())}

    facts = in_child(work, user.store.parent / "facts")
    assert (facts["ran"][0], facts["ran"][2], facts["latest"]) == (0, "", artifact_id[:12])
    assert ("cannot be written" in facts["ran"][1]) == bool(lacks)


@pytest.mark.usefixtures("_imported")
@pytest.mark.parametrize(
    "arguments", [["plan", "tiny"], ["explain", "tiny"], ["cache", "ls"], ["cache", "verify"], ["shard", "tiny"]]
)
def test_looking_needs_no_store_to_write_to(open_to_all: UserDirectory, arguments: list[str]) -> None:
    user = open_to_all
    user.root.chmod(0o777)
    more = ["--output", str(user.root / "shards")] if arguments[0] == "shard" else []

    def work() -> Facts:
        become_another_user(user.store)
        return {"ran": furiosa_build(user, *arguments, *more)}

    status, out, err = in_child(work, user.store.parent / "facts")["ran"]
    assert (status, err) == (0, "")
    assert out


@pytest.mark.usefixtures("_imported")
def test_a_store_where_only_some_may_be_written_is_one_message(open_to_all: UserDirectory) -> None:
    """As after a build with sudo: directories of the store are root's."""
    user = open_to_all
    forget(user, STEP)
    user.root.chmod(0o777)
    user.store.chmod(0o777)

    def work() -> Facts:
        for path in user.store.iterdir():
            path.chmod(path.stat().st_mode & ~0o022)
        if os.getuid() == 0:
            become_another_user(user.store)
        else:
            for path in (path for path in user.store.rglob("*") if path.is_dir()):
                path.chmod(0o555)
        return {"ran": furiosa_build(user, "build", "tiny", "save_dir=elsewhere")}

    status, _, err = in_child(work, user.store.parent / "facts")["ran"]
    assert status == 3
    assert err.startswith(f"error: step {STEP} failed: PermissionError: ")
    assert "Traceback" not in err
