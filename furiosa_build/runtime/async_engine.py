"""The engine for asyncio: requests are generators of outputs, and a thread of its own takes the steps.

The thread alone touches the engine. It takes commands from a queue and gives outputs to the event loop of whoever waits
for them.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import NamedTuple, Self

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.artifact.schema import Artifact
from furiosa_build.core.errors import BuildError
from furiosa_build.runtime import torch_of_caller
from furiosa_build.runtime.engine import LLMEngine, StepFailedError
from furiosa_build.runtime.engine_args import EngineArgs
from furiosa_build.runtime.pooling import PoolingParams
from furiosa_build.runtime.prompts import Prompt
from furiosa_build.runtime.request import RequestOutput
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.stats import EngineStats
from furiosa_build.runtime.text.tokenizer import Tokenizer


class EngineDeadError(BuildError):
    """The engine was shut down, or failed in a way that it cannot go on from."""


class AsyncLLMEngine:
    """An LLMEngine for many coroutines. As a context manager it is shut down at the end.

    Args:
        load: Makes the engine. Called in the thread that takes the steps: OpenMP has a team of threads for every thread
            that has computed, and once all together are more than the cores they wait for each other the slow way.

    Attributes:
        artifact: The engine's `artifact`.
        tokenizer: The engine's `tokenizer`.

    Raises:
        Exception: What `load` raises.
    """

    def __init__(self, load: Callable[[], LLMEngine]) -> None:
        self._worker = _Worker(load)
        self.artifact: Artifact = self._worker.engine.artifact
        self.tokenizer: Tokenizer | None = self._worker.engine.tokenizer

    @classmethod
    def from_engine_args(cls, args: EngineArgs, *, opened: OpenArtifact | None = None) -> Self:
        """The engine of these arguments; `opened` is what `args.open` gives, if that has been called.

        Raises UserError and VerificationError, as LLMEngine does.
        """
        return cls(lambda: LLMEngine.from_engine_args(args, opened=opened))

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | PoolingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """The states of a request, the last one finished.

        Each has the whole text so far. A consumer that is slower than the engine is given the newest state only. One
        that stops before the end aborts the request. That of a request that `abort` drops just ends.

        Args:
            prompt: A text, token ids or chat messages, in any form of `Prompt`.
            sampling_params: How tokens are chosen; PoolingParams for the embedding of the prompt.
            request_id: Not that of another request that is under way.

        Raises:
            EngineFullError: `max_processing_samples` requests are under way.
            UserError: What LLMEngine.add_request refuses.
            StepFailedError: A step failed that this request was part of. Others go on.
            EngineDeadError: The engine was shut down, or is broken.
        """
        stream = _Stream(asyncio.get_running_loop())
        self._worker.submit(lambda: self._worker.add(stream, request_id, prompt, sampling_params), stream.fail)
        try:
            while (output := await stream.next()) is not None:
                yield output
        finally:
            self._worker.submit(lambda: self._worker.drop(request_id, stream), _ignore)

    @property
    def stats(self) -> EngineStats:
        """The figures of `LLMEngine.stats`, from any thread."""
        return self._worker.stats

    @property
    def is_dead(self) -> bool:
        """Whether it was shut down or has failed, so that all requests get an EngineDeadError."""
        return self._worker.has_ended

    async def abort(self, request_id: str) -> None:
        """Drops a request, whose generator ends without a finished output. An unknown id is ignored.

        On return its KV blocks are free, or will be when the batch under way has run.
        """
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # so that a cancelled caller does not cancel it under the thread's hands

        def abort() -> None:
            self._worker.drop(request_id)
            done.set_result(None)

        self._worker.submit(abort, lambda _: done.set_result(None))
        await asyncio.wrap_future(done)

    async def shutdown(self) -> None:
        """Ends the thread, after the step under way. All generators get an EngineDeadError, and so do new ones."""
        self._worker.submit(self._worker.stop, _ignore)
        await asyncio.to_thread(self._worker.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()


class _Stream:
    """Passes the newest output, and how it ends, from the engine's thread to one coroutine."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._changed = asyncio.Event()
        self._output: RequestOutput | None = None
        self._ended = False
        self._error: BaseException | None = None

    async def next(self) -> RequestOutput | None:
        """The newest output, once there is a new one; None at the end."""
        await self._changed.wait()
        output, self._output = self._output, None
        if output is None and self._error is not None:
            raise self._error
        if not self._ended:
            self._changed.clear()
        return output

    # Called in the engine's thread

    def put(self, output: RequestOutput) -> None:
        self._call(lambda: self._set(output, output.finished, None))

    def end(self) -> None:
        self._call(lambda: self._set(None, True, None))

    def fail(self, error: BaseException) -> None:
        self._call(lambda: self._set(None, True, error))

    def _set(self, output: RequestOutput | None, ended: bool, error: BaseException | None) -> None:
        self._output = output or self._output
        self._ended, self._error = ended, error
        self._changed.set()

    def _call(self, change: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(change)


def _ignore(dead: EngineDeadError) -> None:
    """Does nothing: the engine's end has the same effect as the command."""


class _Command(NamedTuple):
    """Something for the thread to do; `refuse` is called instead when the thread has ended."""

    execute: Callable[[], None]
    refuse: Callable[[EngineDeadError], None]


class _Worker:
    """The thread that loads the engine and takes its steps, and executes commands between them.

    Attributes:
        engine: Only for what does not change.
        has_ended: Whether the thread takes no more commands.
    """

    def __init__(self, load: Callable[[], LLMEngine]) -> None:
        self._streams: dict[str, _Stream] = {}
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._stopped = False
        self._lock = threading.Lock()
        self.has_ended = False
        self._cause: Exception | None = None
        loaded: Future[None] = Future()
        self._num_threads = torch_of_caller.num_threads()
        self._thread = threading.Thread(target=self._run, args=(load, loaded), name="engine", daemon=True)
        self._thread.start()
        loaded.result()

    def submit(self, execute: Callable[[], None], refuse: Callable[[EngineDeadError], None]) -> None:
        """Queues a command for the thread. May be called in any thread."""
        with self._lock:
            if not self.has_ended:
                self._commands.put(_Command(execute, refuse))
                return
        refuse(self._dead())

    def join(self) -> None:
        """Waits for the thread's end."""
        self._thread.join()

    @property
    def stats(self) -> EngineStats:
        """The engine's statistics, in any thread; during a step the numbers may be of different moments."""
        return self.engine.stats()

    # Commands, called in the thread

    def add(self, stream: _Stream, request_id: str, prompt: Prompt, params: SamplingParams | PoolingParams) -> None:
        try:
            self.engine.add_request(request_id, prompt, params)
        except Exception as error:  # of this request alone
            stream.fail(error)
        else:
            self._streams[request_id] = stream

    def drop(self, request_id: str, stream: _Stream | None = None) -> None:
        """Aborts a request: with `stream`, only if the id is that stream's."""
        found = self._streams.get(request_id)
        if found is not None and stream in (None, found):
            del self._streams[request_id]
            self.engine.abort_request(request_id)
            found.end()

    def stop(self) -> None:
        self._stopped = True

    # The thread

    def _run(self, load: Callable[[], LLMEngine], loaded: Future[None]) -> None:
        torch_of_caller.use_threads(self._num_threads)  # not a rank's part
        try:
            self.engine = load()
            self.engine.prepare_guides()  # it would hold up the event loop
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        try:
            while True:
                self._execute_commands()
                if self._stopped:
                    break
                self._step()
        except Exception as error:  # not a batch's: the internal state may be inconsistent
            self._cause = error
        self._end()

    def _execute_commands(self) -> None:
        """Executes all commands in the queue; waits for one when no request is under way."""
        waits = not self.engine.has_unfinished_requests()
        while not self._stopped:
            try:
                command = self._commands.get(block=waits)
            except queue.Empty:
                return
            command.execute()
            waits = False

    def _step(self) -> None:
        try:
            outputs = self.engine.step()
        except StepFailedError as failed:
            outputs = failed.outputs
            for request_id, error in failed.errors.items():
                own = StepFailedError({request_id: error})
                own.__cause__ = error
                self._streams.pop(request_id).fail(own)
        for output in outputs:
            stream = self._streams[output.request_id]
            if output.finished:
                del self._streams[output.request_id]
            stream.put(output)

    def _end(self) -> None:
        with self._lock:
            self.has_ended = True
        while not self._commands.empty():
            self._commands.get().refuse(self._dead())
        for stream in self._streams.values():
            stream.fail(self._dead())
        if self._cause is None:
            self.engine.abort_request(self._streams)
        self.engine.close()

    def _dead(self) -> EngineDeadError:
        """A new error for every place that raises it: a traceback grows with every raise."""
        if self._cause is None:
            return EngineDeadError("the engine was shut down")
        error = EngineDeadError(f"the engine has failed: {self._cause}")
        error.__cause__ = self._cause
        return error
