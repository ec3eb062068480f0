"""Actions that several threads or processes want at once: the work is done once, and nobody waits in vain."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from furiosa_build.core.errors import StepError
from furiosa_build.store import ActionRecord, ActionResult, Store

from .working import KEY, OTHER_KEY, TWO_FILES, no_work, obtain


def test_many_threads_do_the_work_once(store: Store) -> None:
    count, start = 8, threading.Barrier(8)
    works: list[Path] = []

    def work(output: Path) -> ActionResult:
        works.append(output)
        return TWO_FILES(output)

    def one(_: int) -> tuple[ActionRecord, bool]:
        start.wait()
        return obtain(store, work)

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(one, range(count)))
    assert len(works) == 1
    assert sorted(ran for _, ran in results) == [False] * (count - 1) + [True]
    assert {record.digest for record, _ in results} == {results[0][0].digest}


def test_other_keys_do_not_wait_for_each_other(store: Store) -> None:
    both_work = threading.Barrier(2)

    def work(output: Path) -> ActionResult:
        both_work.wait(60)
        return TWO_FILES(output)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda key: obtain(store, work, key), [KEY, OTHER_KEY]))
    assert [ran for _, ran in results] == [True, True]


def test_with_locks_that_do_nothing_the_result_is_right(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def nothing(self: Store, key: str, step: str) -> Iterator[None]:
        del self, key, step
        yield

    monkeypatch.setattr(Store, "lock", nothing)
    count, all_have_written = 4, threading.Barrier(4)

    def work(output: Path) -> ActionResult:
        made = TWO_FILES(output)
        all_have_written.wait(60)  # So that all of them publish at the same time.
        return made

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(lambda _: obtain(store, work), range(count)))
    assert [ran for _, ran in results] == [True] * count
    assert {record.digest for record, _ in results} == {results[0][0].digest}
    found = store.find(KEY)
    assert found is not None
    assert store.read_json(found, "deep/er/two") == {"a": 2}
    assert len([path for path in (store.root / "blobs").rglob("*") if path.is_file()]) == 2
    assert not [path for path in (store.root / "sessions").glob("*/*") if path.is_dir()]


def _obtain_in_process(root: Path, runs: Path, start: Barrier, results: Queue[Any]) -> None:
    def work(output: Path) -> ActionResult:
        with runs.open("a") as file:
            file.write("ran\n")
        return TWO_FILES(output)

    store = Store(root)
    start.wait()
    record, ran = obtain(store, work)
    results.put((record.digest, ran))


def test_two_processes_do_the_work_once(store: Store, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    arguments = (store.root, tmp_path / "runs", start, results)
    processes = [context.Process(target=_obtain_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    found = sorted((results.get(timeout=60) for _ in processes), key=lambda result: bool(result[1]))
    for process in processes:
        process.join()
    assert [ran for _, ran in found] == [False, True]
    assert found[0][0] == found[1][0]
    assert (tmp_path / "runs").read_text() == "ran\n"


class Holder:
    """A process that holds the lock of KEY until it is killed."""

    def __init__(self, store: Store) -> None:
        held, says = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with Store(store.root).lock(KEY, "test"):
                os.write(says, b"x")
                signal.pause()
        os.read(held, 1)
        os.close(held)
        os.close(says)

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


@pytest.fixture
def holder(store: Store) -> Iterator[Holder]:
    started = Holder(store)
    yield started
    started.kill()


def test_who_waits_says_for_whom_and_goes_on_when_that_is_killed(store: Store, holder: Holder) -> None:
    told: list[str] = []
    killed_at = []

    def tell(message: str) -> None:
        told.append(message)
        holder.kill()
        killed_at.append(time.monotonic())

    store.notify, pid = tell, holder.pid
    assert obtain(store, TWO_FILES)[1]
    assert time.monotonic() - killed_at[0] < 5
    assert told == [f"test: waiting for process {pid} on {platform.node()}, which is doing it"]
    told.clear()
    obtain(store, TWO_FILES, OTHER_KEY)
    assert told == [], "nobody to wait for"


def test_who_waits_can_be_interrupted(store: Store, holder: Holder) -> None:
    store.notify = lambda _: store.interrupt()
    with pytest.raises(StepError, match="step test failed: the build was interrupted"):
        obtain(store, no_work)
    holder.kill()
    assert store.find(KEY) is None
