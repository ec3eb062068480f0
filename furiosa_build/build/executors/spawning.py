"""How worker processes begin and end: spawned, in an environment and a process group of their own."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from furiosa_build.build.executors.environment import HASH_SEED, clean_environment


class _Process(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 (multiprocessing calls it so)
        """Starts a worker as multiprocessing does, but the worker does not import the main program again.

        That would be the script of somebody who calls `ArtifactBuilder` without `if __name__ == "__main__"`. Strings
        have the same hashes in every worker.
        """
        main = sys.modules["__main__"]
        with _changing_main:
            hidden: dict[str, Any] = {
                name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)
            }
            main.__spec__ = None
            try:
                with _environment(*HASH_SEED):  # Python reads it as it starts
                    return SpawnProcess._Popen(process_obj)
            finally:
                vars(main).update(hidden)


_changing_main = threading.Lock()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Within, a variable of the environment has this value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class Spawn(SpawnContext):
    """The context that workers are started in."""

    Process = _Process


def begin_worker() -> None:
    """Makes a new worker and its compilers a process group, which ends when the build's process does."""
    clean_environment()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a library may print what the locale lacks
    os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()


def track_quietly() -> None:
    """Starts the process that cleans up semaphores. When workers are killed there are some, and it would say so."""
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.pop()
