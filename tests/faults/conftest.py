"""A built directory that each test may ruin, and builds in processes of their own that can be stopped and killed.

A child is forked, so that torch is imported once; it runs its steps by itself, without workers.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from user_directory import UserDirectory, make_new_directory, make_user_directory, run, steps_in_this_process

from furiosa_build.backends.eager import EagerBackend
from furiosa_build.core import failpoints
from furiosa_build.store import Store, gc


def build(user: UserDirectory, *overrides: str) -> list[str]:
    """Builds to the end, in this process; returns the steps that did work."""
    with closing(user.open(*overrides)) as opened:
        return run(opened)


def assert_sound(user: UserDirectory, artifact_id: str) -> None:
    """The artifact is the undisturbed one, the store is whole, and gc finds everything that was left behind."""
    assert user.latest().metadata.artifact_id == artifact_id
    store = Store(user.store)
    assert list(gc.verify(store)) == []
    gc.collect(store)
    assert list((user.store / "sessions").glob("*")) == []
    assert list(user.store.rglob(".*")) == []
    assert [path.name for path in user.artifacts.iterdir() if path.name.startswith(".")] == []
    assert build(user) == [], "gc has removed nothing that counts"


@dataclass
class Child:
    """A build in another process. `result` is what it wrote when it ended: the steps that ran, or the error."""

    pid: int
    output: Path

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def result(self) -> dict[str, Any]:
        os.waitpid(self.pid, 0)
        found: dict[str, Any] = json.loads(self.output.read_text())
        return found


StartChild = Callable[..., Child]


@pytest.fixture(autouse=True, scope="module")
def _programs_unlike_graphs() -> Iterator[None]:
    """Steps run in this process. The eager backend's program is its graph: with a blank, it is a blob of its own."""
    compile_graph = EagerBackend.compile

    def compile_with_a_blank(self: EagerBackend, graph: Any, output: Path, *rest: Any) -> None:
        compile_graph(self, graph, output, *rest)
        output.write_bytes(output.read_bytes() + b" ")

    with steps_in_this_process() as patch:
        patch.setattr(EagerBackend, "compile", compile_with_a_blank)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """Built without a disturbance. Only read."""
    user = make_new_directory(tmp_path_factory.mktemp("faults"))
    build(user)
    return user


@pytest.fixture
def user(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """A copy of it."""
    shutil.copytree(built.root, tmp_path / "user", symlinks=True)
    shutil.copytree(built.store, tmp_path / "store")
    return UserDirectory(tmp_path / "user", tmp_path / "store")


@pytest.fixture
def fresh(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """Nothing has been built."""
    return make_user_directory(tmp_path / "user", tmp_path / "store", built.root / "tiny")


@pytest.fixture
def artifact_id(built: UserDirectory) -> str:
    return built.latest().metadata.artifact_id


@pytest.fixture
def start_child(tmp_path: Path) -> Iterator[StartChild]:
    """`start_child(user, fault="STEP@POINT=FIFO", tell=FIFO)`: a build; `tell` is where its messages go."""
    children: list[Child] = []

    def start(user: UserDirectory, fault: str = "", tell: Path | None = None, recipe: str = "tiny") -> Child:
        output = tmp_path / f"child-{len(children)}.json"
        pid = os.fork()
        if pid == 0:
            _child(user, recipe, fault, tell, output)
        children.append(Child(pid, output))
        return children[-1]

    yield start
    for child in children:
        try:
            child.kill()
        except (ProcessLookupError, ChildProcessError):
            continue


def _child(user: UserDirectory, recipe: str, fault: str, tell: Path | None, output: Path) -> None:
    try:
        if fault:
            os.environ[failpoints.VARIABLE] = fault
        with closing(user.open(recipe=recipe)) as opened:
            if tell is not None:
                opened.store.notify = lambda message: void(tell.write_text(message))
            output.write_text(json.dumps({"ran": run(opened)}))
    except BaseException as error:
        output.write_text(json.dumps({"error": str(error), "trace": traceback.format_exc()}))
    finally:
        if fault:
            with suppress(OSError):  # nobody is waiting
                os.write(os.open(fault.partition("=")[2], os.O_WRONLY | os.O_NONBLOCK), b"never reached")
        os._exit(0)


def void(_: object) -> None: ...


def forget(user: UserDirectory, step: str) -> None:
    """Makes a step as if it had never been done: its action and what it made are gone."""
    for record, _, _ in list(Store(user.store).records()):
        if record.step == step:
            shutil.rmtree(user.store / "actions" / record.key[:2] / record.key)
            for output in record.outputs.values():
                Store(user.store).path(output).unlink(missing_ok=True)
