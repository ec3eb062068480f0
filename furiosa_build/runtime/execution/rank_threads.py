"""The threads in which the ranks of a replica compute."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from furiosa_build.backends.device import Device
from furiosa_build.runtime.execution.thread_shares import ThreadShare

T = TypeVar("T")


class RankThread(threading.Thread):
    """A thread that calls functions in the order in which they are queued.

    What computes here has its share of the cores: OpenMP keeps a team of threads for every thread that has computed,
    and once all teams together are more than the cores, they wait for each other the slow way.
    """

    def __init__(self, number: int, device: Device[Any], share: ThreadShare) -> None:
        super().__init__(name=f"element {number}", daemon=True)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._device, self._share = device, share
        self.start()

    def put(self, function: Callable[[], None]) -> None:
        """Queues a call of `function`, which does not raise."""
        self._calls.put(function)

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Queues a call of `function`. Returns its result to be."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                result = function()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self.put(run)
        return future

    def end(self) -> None:
        """Ends the thread after the calls that are queued."""
        self._calls.put(None)

    def run(self) -> None:
        """The thread's main loop."""
        self._share.begin(self._device)
        while (function := self._calls.get()) is not None:
            function()
            del function  # which knows a rank and its KV caches


class RankThreads:
    """One thread for each element of a replica: rank r of stage s is element s * ranks + r.

    The model and its draft share them: an element of the draft runs in the thread of the model's with the same number.
    The threads end with this object at the latest.
    """

    def __init__(self, device: Device[Any], shares: Sequence[ThreadShare]) -> None:
        self.threads = [RankThread(element, device, share) for element, share in enumerate(shares)]
        # Knows the threads and not this object, so that it runs also where nobody calls `close`.
        self._end = weakref.finalize(self, _end, self.threads)

    def close(self) -> None:
        """Ends the threads."""
        self._end()


def _end(threads: Sequence[RankThread]) -> None:
    """Ends the threads, and waits: one that computes while the interpreter ends would abort the process."""
    for thread in threads:
        thread.end()
    if isinstance(threading.current_thread(), RankThread):
        return  # The object was garbage, found in a rank's thread: that rank may be the one the others wait for.
    for thread in threads:
        thread.join()
