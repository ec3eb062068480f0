"""Sessions: what a process uses is pinned as long as it lives, however it ends."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from furiosa_build.store.locks import exclusive, is_locked, locks_work, open_lock, shared, try_lock
from furiosa_build.store.sessions import Session, all_sessions, is_alive, pins


def test_a_session_is_made_when_it_is_needed(tmp_path: Path) -> None:
    session = Session(tmp_path / "store")
    session.close()
    assert not (tmp_path / "store").exists()
    session.pin("a")
    (directory,) = all_sessions(tmp_path / "store")
    assert is_alive(directory)
    assert directory.name.startswith(f"{os.getpid()}-")
    session.close()
    assert all_sessions(tmp_path / "store") == []


def test_pins(tmp_path: Path) -> None:
    session = Session(tmp_path)
    for key in ("a", "b", "a"):
        session.pin(key)
    (directory,) = all_sessions(tmp_path)
    assert pins(directory) == {"a", "b"}
    session.close()
    session.pin("c")
    (directory,) = all_sessions(tmp_path)
    assert pins(directory) == {"c"}, "a session begun anew"
    session.close()


def test_a_pin_that_a_full_disk_cut_short_spoils_no_other(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.pin("a")
    (directory,) = all_sessions(tmp_path)
    with (directory / "pins").open("a") as file:
        file.write("\nhal")
    session.pin("b")
    assert {"a", "b"} <= pins(directory)
    (directory / "pins").write_bytes(b"\xff\xfe")
    assert isinstance(pins(directory), set)
    session.close()


def test_many_threads_have_one_session(tmp_path: Path) -> None:
    session, start = Session(tmp_path), threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        with session.staging() as staged:
            (staged / "f").write_text(str(number))
            session.pin(str(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (directory,) = all_sessions(tmp_path)
    assert pins(directory) == set(map(str, range(8)))
    assert [path for path in directory.iterdir() if path.is_dir()] == []
    session.close()


def test_a_session_ends_with_its_process(tmp_path: Path) -> None:
    ready, says = os.pipe()
    child = os.fork()
    if child == 0:
        Session(tmp_path).pin("a")
        os.write(says, b"x")
        signal.pause()
    try:
        os.read(ready, 1)
        (directory,) = all_sessions(tmp_path)
        assert is_alive(directory)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(says)
    assert not is_alive(directory)
    assert pins(directory) == {"a"}


def test_a_session_killed_before_its_lock_is_not_alive(tmp_path: Path) -> None:
    (tmp_path / "sessions" / "1-abc").mkdir(parents=True)
    (directory,) = all_sessions(tmp_path)
    assert not is_alive(directory)
    assert pins(directory) == set()
    assert list(directory.iterdir()) == [], "to look changes nothing"


def test_a_session_neither_begins_nor_ends_while_gc_deletes(tmp_path: Path) -> None:
    """gc must not see a session without its lock, nor one that is half gone."""
    session, done = Session(tmp_path), threading.Event()
    tmp_path.joinpath("gc.lock").touch()

    def begin() -> None:
        session.pin("a")
        done.set()

    def end() -> None:
        session.close()
        done.set()

    for change, count in ((begin, 0), (end, 1)):
        done.clear()
        with exclusive(tmp_path):
            thread = threading.Thread(target=change)
            thread.start()
            assert not done.wait(0.2)
            assert len(all_sessions(tmp_path)) == count
            assert all(is_alive(directory) for directory in all_sessions(tmp_path))
        thread.join()
        assert done.is_set()


# Locks


def test_a_lock_excludes_and_ends_with_its_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "a" / "lock"
    assert not is_locked(path)
    assert not path.exists(), "to look makes nothing"
    one, other = open_lock(path), open_lock(path)
    assert try_lock(one)
    assert is_locked(path)
    assert not try_lock(other)
    os.close(one)
    assert not is_locked(path)
    assert try_lock(other)
    os.close(other)


def test_to_look_at_a_lock_disturbs_nobody_else_who_looks(tmp_path: Path) -> None:
    with shared(tmp_path), shared(tmp_path):
        assert not is_locked(tmp_path / "gc.lock")
    with exclusive(tmp_path):
        assert is_locked(tmp_path / "gc.lock")


def test_whether_locks_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locks_work(tmp_path)
    monkeypatch.setattr("fcntl.flock", Mock())
    assert not locks_work(tmp_path)
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(38, "Function not implemented")))
    assert not locks_work(tmp_path)
    assert list((tmp_path / "locks").iterdir()) == []


@pytest.mark.parametrize("error", [None, OSError(37, "No locks available")], ids=["nothing", "refused"])
def test_where_locks_do_nothing_sessions_and_guards_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError | None
) -> None:
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=error))
    session = Session(tmp_path)
    with exclusive(tmp_path), shared(tmp_path), session.staging() as staged:
        session.pin("a")
        assert staged.is_dir()
    session.close()
    assert all_sessions(tmp_path) == []
