from __future__ import annotations

import sys
import threading
from multiprocessing.context import SpawnProcess
from typing import Any

import pytest

from furiosa_build.build.executors import spawning


class DoorLock:
    """A lock that says when somebody comes to take it."""

    def __init__(self) -> None:
        self._lock, self.arrived = threading.Lock(), threading.Event()

    def __enter__(self) -> None:
        self.arrived.set()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_two_pools_that_start_at_once_leave_the_program_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__file__", "program.py", raising=False)
    monkeypatch.setattr(main, "__spec__", "its spec", raising=False)
    lock = DoorLock()
    monkeypatch.setattr(spawning, "_changing_main", lock)
    second = threading.Thread(target=spawning._Process._Popen, args=("second",))

    def start(process: Any) -> Any:
        assert not hasattr(main, "__file__")
        assert main.__spec__ is None
        if process == "first":
            lock.arrived.clear()
            second.start()
            assert lock.arrived.wait(60), "the second begins while the first is at it"

    monkeypatch.setattr(SpawnProcess, "_Popen", staticmethod(start))
    spawning._Process._Popen("first")
    second.join()
    assert (main.__file__, main.__spec__) == ("program.py", "its spec")
