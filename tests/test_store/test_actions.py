"""Actions: work done once, found again by its key, and nothing of it visible before all of it is there."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from furiosa_build.core import failpoints
from furiosa_build.core.canonical_json import canonical_json, digest
from furiosa_build.core.errors import StepError
from furiosa_build.store import ActionRecord, Made, Store, default_store_root

FACTORS = {"step": "test", "reads": {"b": 1, "a": [1, 2]}}
OTHER_FACTORS = {"step": "test", "reads": {"b": 2}}
KEY, OTHER_KEY = digest(FACTORS), digest(OTHER_FACTORS)

Work = Callable[[Path], Made]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def writing(files: Mapping[str, str], made: Made | None = None) -> Work:
    """Work that writes these files."""

    def work(output: Path) -> Made:
        for name, text in files.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_text(text)
        return made or Made()

    return work


def no_work(output: Path) -> Made:
    raise AssertionError(f"the work ran, in {output}")


def obtain(store: Store, work: Work, key: str = KEY) -> tuple[ActionRecord, bool]:
    return store.obtain(key, "test", {KEY: FACTORS, OTHER_KEY: OTHER_FACTORS}[key], work)


def blob(store: Store, record: ActionRecord, name: str) -> Path:
    return store.path(record.outputs[name])


def overwrite(path: Path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


TWO_FILES = writing({"one": "1", "deep/er/two": '{"a": 2}'})


def test_obtain_does_the_work_and_records_it(store: Store) -> None:
    record, ran = obtain(store, TWO_FILES)
    assert ran
    assert (record.key, record.step) == (KEY, "test")
    assert list(record.outputs) == ["deep/er/two", "one"]
    assert blob(store, record, "one").read_text() == "1"
    assert store.read_json(record, "deep/er/two") == {"a": 2}
    assert store.find(KEY) == record


def test_obtain_does_the_work_once(store: Store, tmp_path: Path) -> None:
    record, _ = obtain(store, TWO_FILES)
    assert obtain(store, no_work) == (record, False)
    assert obtain(Store(tmp_path / "store"), no_work) == (record, False), "another process finds it"


def test_an_unknown_key_is_not_found_and_finding_makes_nothing(store: Store, tmp_path: Path) -> None:
    assert store.find(KEY) is None
    assert not list(tmp_path.iterdir())


def test_key_factors_lie_beside_the_manifest(store: Store) -> None:
    obtain(store, TWO_FILES)
    directory = store.root / "actions" / KEY[:2] / KEY
    assert sorted(path.name for path in directory.iterdir()) == ["key_factors.json", "manifest.json"]
    assert (directory / "key_factors.json").read_bytes() == canonical_json(FACTORS)


def test_nothing_but_the_action_is_left(store: Store) -> None:
    obtain(store, TWO_FILES)
    assert not [path for path in (store.root / "sessions").glob("*/*") if path.is_dir()]


def test_outputs_are_read_only(store: Store) -> None:
    record, _ = obtain(store, TWO_FILES)
    assert [stat.S_IMODE(store.path(output).stat().st_mode) for output in record.outputs.values()] == [0o444, 0o444]


def test_what_the_work_says_of_itself_is_taken(store: Store) -> None:
    """A digest that the work computed while it wrote, and its own time: it may have waited for its turn."""
    sha256 = digest("as if computed while writing")
    record, _ = obtain(store, writing({"one": "1"}, Made({"one": sha256}, seconds=12.5)))
    assert record.outputs["one"].sha256 == sha256
    assert record.seconds == 12.5


# Early cut-off


def test_equal_output_has_an_equal_digest_whatever_the_key_and_the_time(store: Store) -> None:
    one, _ = obtain(store, writing({"a": "1", "b": "2"}, Made(seconds=1.0)))
    other, ran = obtain(store, writing({"b": "2", "a": "1"}, Made(seconds=2.0)), OTHER_KEY)
    assert ran
    assert one.digest == other.digest
    assert blob(store, one, "a") == blob(store, other, "a"), "and is stored once"


@pytest.mark.parametrize("files", [{"a": "1"}, {"a": "1", "b": "3"}, {"a": "1", "c": "2"}, {"a": "2", "b": "1"}])
def test_other_output_has_another_digest(store: Store, files: dict[str, str]) -> None:
    one, _ = obtain(store, writing({"a": "1", "b": "2"}))
    other, _ = obtain(store, writing(files), OTHER_KEY)
    assert one.digest != other.digest


# Failures


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["failed", "interrupted"])
def test_a_failure_is_not_recorded(store: Store, error: BaseException) -> None:
    def work(output: Path) -> Made:
        TWO_FILES(output)
        raise error

    with pytest.raises(type(error)):
        obtain(store, work)
    assert store.find(KEY) is None
    assert not (store.root / "actions").exists()
    assert not [path for path in (store.root / "sessions").glob("*/*") if path.is_dir()]
    assert obtain(store, TWO_FILES)[1], "the next build tries again"


def test_an_action_is_not_done_before_its_manifest_is_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, "test@before-rename=errno:ENOSPC")
        with pytest.raises(OSError, match="No space left"):
            obtain(store, TWO_FILES)
    assert not list(store.root.glob("actions/*/*/.manifest*"))
    assert store.find(KEY) is None
    assert obtain(store, TWO_FILES)[1]


# Damage


@pytest.mark.parametrize("damage", [None, b"", b"[1]", b"[1, 2] "], ids=["missing", "empty", "short", "long"])
def test_a_damaged_blob_under_a_hit_is_a_miss_and_is_healed(store: Store, damage: bytes | None) -> None:
    record, _ = obtain(store, writing({"whole": "1", "damaged": "[1, 2]"}))
    path = blob(store, record, "damaged")
    if damage is None:
        path.unlink()
    else:
        overwrite(path, damage)
    assert store.find(KEY) is None
    again, ran = obtain(store, writing({"whole": "1", "damaged": "[1, 2]"}))
    assert ran
    assert again.outputs == record.outputs
    assert path.read_text() == "[1, 2]"
    assert store.find(KEY) == again


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"key": "k"}', b"\xff\xfe"])
def test_a_damaged_manifest_is_a_miss_and_is_replaced(store: Store, damage: bytes) -> None:
    record, _ = obtain(store, TWO_FILES)
    manifest = store.root / "actions" / KEY[:2] / KEY / "manifest.json"
    overwrite(manifest, damage)
    assert store.find(KEY) is None
    assert obtain(store, TWO_FILES)[0].outputs == record.outputs
    assert json.loads(manifest.read_bytes())["key"] == KEY


# Several at once


def test_many_threads_do_the_work_once(store: Store) -> None:
    count, start = 8, threading.Barrier(8)
    works: list[Path] = []

    def work(output: Path) -> Made:
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

    def work(output: Path) -> Made:
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

    def work(output: Path) -> Made:
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
    def work(output: Path) -> Made:
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

    store.tell, pid = tell, holder.pid
    assert obtain(store, TWO_FILES)[1]
    assert time.monotonic() - killed_at[0] < 5
    assert told == [f"test: waiting for process {pid} on {platform.node()}, which is doing it"]
    told.clear()
    obtain(store, TWO_FILES, OTHER_KEY)
    assert told == [], "nobody to wait for"


def test_who_waits_can_be_interrupted(store: Store, holder: Holder) -> None:
    store.tell = lambda _: store.interrupt()
    with pytest.raises(StepError, match="step test failed: the build was interrupted"):
        obtain(store, no_work)
    holder.kill()
    assert store.find(KEY) is None


# A store that cannot be written


def written(root: Path) -> dict[Path, tuple[int, int, int]]:
    """Mode, size and time of writing of every path; the time of reading may change."""
    stats = {path: path.stat() for path in root.rglob("*")}
    return {path: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


@pytest.fixture
def sealed(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store with the action of KEY, as someone sees it who may not write there."""
    obtain(store, TWO_FILES)
    store.close()
    monkeypatch.setattr(Store, "is_writable", property(lambda self: self.root != tmp_path / "store"))
    before = written(store.root)
    yield Store(store.root, spare=tmp_path / "spare" / "deep")
    assert written(store.root) == before


def test_what_it_has_is_used(sealed: Store, tmp_path: Path) -> None:
    record, ran = obtain(sealed, no_work)
    assert not ran
    assert blob(sealed, record, "one").read_text() == "1"
    sealed.close()
    assert not (tmp_path / "spare").exists()


def test_what_it_lacks_is_made_beside_it_and_said_once(sealed: Store, tmp_path: Path) -> None:
    told: list[str] = []
    sealed.tell = told.append
    sealed.log_path("test")
    record, ran = obtain(sealed, writing({"new": "[2]"}), OTHER_KEY)
    assert ran
    assert told == [f"the store {sealed.root} cannot be written: what is built is not kept there"]
    assert obtain(sealed, no_work, OTHER_KEY) == (record, False)
    assert sealed.find(OTHER_KEY) == record
    assert sealed.read_json(record, "new") == [2]
    assert tmp_path / "spare" / "deep" in blob(sealed, record, "new").parents
    sealed.close()
    assert list((tmp_path / "spare" / "deep").iterdir()) == []


def test_the_log_of_a_step_that_fails_stays(sealed: Store, tmp_path: Path) -> None:
    """The rest of the substitute goes."""
    with pytest.raises(ZeroDivisionError):
        obtain(sealed, Mock(side_effect=ZeroDivisionError), OTHER_KEY)
    obtain(sealed, TWO_FILES, OTHER_KEY)
    log = sealed.log_path("test")
    log.write_text("why")
    sealed.close()
    assert log.read_text() == "why"
    assert [path for path in (tmp_path / "spare").rglob("*") if not path.is_dir()] == [log]


def test_what_is_damaged_there_is_made_beside_it(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And taken from there, although a blob of its name is in the store."""
    record, _ = obtain(store, TWO_FILES)
    overwrite(blob(store, record, "one"), b"?")
    store.close()
    monkeypatch.setattr(Store, "is_writable", property(lambda self: self.root != tmp_path / "store"))
    sealed = Store(store.root, spare=tmp_path / "spare")
    again, ran = obtain(sealed, TWO_FILES)
    assert ran
    assert blob(sealed, again, "one").read_text() == "1"
    sealed.close()


def test_whether_it_can_be_written_is_that_of_the_nearest_directory(tmp_path: Path) -> None:
    assert Store(tmp_path / "not" / "yet").is_writable
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    assert not Store(tmp_path / "gone").is_writable, "a link that leads nowhere can be neither made nor written"


# Where things are


def test_the_root_is_that_of_the_environment_or_in_the_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("FURIOSA_BUILD_CACHE", raising=False)
    assert default_store_root() == Path("/home/somebody/.cache/furiosa/llm")
    monkeypatch.setenv("FURIOSA_BUILD_CACHE", "")
    assert default_store_root() == Path("/home/somebody/.cache/furiosa/llm")
    monkeypatch.setenv("FURIOSA_BUILD_CACHE", "~/elsewhere")
    assert default_store_root() == Path("/home/somebody/elsewhere")


def test_logs_are_named_after_their_step(store: Store) -> None:
    path = store.log_path("compile:decode-1x64:block")
    assert path.name.startswith("compile-decode-1x64-block-")
    path.write_text("its directory is there")


def test_scratch_survives_and_is_apart_for_every_tool(store: Store) -> None:
    assert store.scratch("a") == store.scratch("a") != store.scratch("b")
    assert store.root in store.scratch("a").parents
