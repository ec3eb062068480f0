"""The texts of an HTTP request: several requests of the engine, which begin together and end together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request

from furiosa_build.runtime.pooling import PoolingParams
from furiosa_build.runtime.request import RequestOutput
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.server.http.errors import api_error, bad_request, timed_out, unavailable
from furiosa_build.server.http.middleware import log_fields
from furiosa_build.server.service import Service

logger = logging.getLogger("furiosa_build.server")

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client has closed the connection."""


class Generation:
    """Texts of prompts: text i is of prompt i // n, sampled by parameters i % n.

    Args:
        service: The server, whose engine generates.
        request: The HTTP request; its log line tells the outcome.
        prompts: Token ids.
        params: n of them; or one for pooling, and then the texts are empty.

    Raises:
        ApiError: A prompt is too long, or there are more texts than the engine ever takes.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams | PoolingParams],
    ) -> None:
        self._service, self._log = service, log_fields(request.scope)
        self._name: str = request.state.admitted_as
        self._metrics = service.metrics
        self._jobs = [(prompt, each) for prompt in prompts for each in params]
        self._updates: dict[int, RequestOutput] = {}
        self._changed = asyncio.Event()
        self._error: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._unfinished = len(self._jobs)
        self._reasons: list[str] = []
        self.prompt_tokens = sum(map(len, prompts))
        self.generated_tokens = 0
        self._refuse_impossible(prompts)

    def _refuse_impossible(self, prompts: Sequence[list[int]]) -> None:
        most = self._service.options.max_prompt_tokens
        longest = max(map(len, prompts))
        if most is not None and longest > most:
            raise bad_request(
                f"the prompt has {longest} tokens; at most {most} are accepted", "prompt", "prompt_too_long"
            )
        limit = self._service.engine.artifact.generator_config.default_scheduler_config.max_processing_samples
        if len(self._jobs) > limit:
            raise bad_request(f"{len(self._jobs)} texts requested; at most {limit} are generated at once", "n")

    async def stream(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """The texts' states as they come: (text, state). Each text's last is finished.

        Raises:
            ApiError: A text has failed, the time limit is reached, or the server shuts down.
        """
        self._tasks = [
            asyncio.create_task(self._run(index, f"{self._name}-{index}")) for index in range(len(self._jobs))
        ]
        limit = asyncio.create_task(self._end_in_time())
        try:
            while self._unfinished or self._updates:
                await self._changed.wait()
                self._changed.clear()
                updates, self._updates = self._updates, {}
                for index in sorted(updates):
                    yield index, updates[index]
                if self._error is not None:
                    raise api_error(self._error) from self._error
        finally:
            self._stop()
            limit.cancel()
            await asyncio.gather(*self._tasks, limit, return_exceptions=True)
            self._log |= {
                "prompt_tokens": self.prompt_tokens,
                "generated_tokens": self.generated_tokens,
                "finish_reasons": self._reasons,
            }

    async def collect(self, request: Request) -> list[RequestOutput]:
        """The texts when all are finished. Raises as `stream`, and ClientGoneError."""

        async def last() -> dict[int, RequestOutput]:
            async with aclosing(self.stream()) as states:
                return {index: output async for index, output in states}

        finished = await unless_gone(request, last())
        return [finished[index] for index in range(len(self._jobs))]

    async def _end_in_time(self) -> None:
        seconds = self._service.options.request_timeout_s
        try:
            await asyncio.wait_for(self._service.aborting.wait(), seconds)
        except TimeoutError:
            self._error = timed_out(seconds)
        else:
            self._error = unavailable("the server is shutting down")
        self._stop()

    def _stop(self) -> None:
        """Aborts unfinished texts. Does not wait for a client that does not read: blocks are free at once."""
        for task in self._tasks:
            task.cancel()
        self._changed.set()

    async def _run(self, index: int, request_id: str) -> None:
        """Generates a text. The engine knows it by `request_id`, from which its random numbers derive."""
        prompt, params = self._jobs[index]
        started, reason = time.monotonic(), "abort"
        first: tuple[float, int] | None = None
        tokens = 0
        try:
            states = self._service.engine.generate(prompt, params, request_id)
            async with aclosing(states):
                async for state in states:
                    tokens = sum(len(output.token_ids) for output in state.outputs)
                    if first is None:
                        first = time.monotonic(), tokens
                        self._metrics.queue.observe(state.queued_s)
                        self._metrics.first_token.observe(first[0] - started)
                        self._log.setdefault("first_token_s", round(first[0] - started, 6))
                    self._updates[index] = state
                    self._changed.set()
                    if state.finished:
                        reason = state.outputs[0].finish_reason or "stop"
        except Exception as error:
            reason, self._error = "error", self._error or error
            if api_error(error).status_code >= 500:
                logger.exception("a text failed", extra={"fields": {"request_id": self._log["request_id"]}})
            self._stop()
        finally:
            now = time.monotonic()
            if first is not None and tokens > first[1]:
                self._metrics.per_token.observe((now - first[0]) / (tokens - first[1]))
            self._metrics.duration.observe(now - started)
            self._metrics.finished.labels(reason).inc()
            self._metrics.generated_tokens.inc(tokens)
            self.generated_tokens += tokens
            self._reasons.append(reason)
            self._unfinished -= 1
            self._changed.set()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes. Raises ClientGoneError then."""
    doing = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGoneError
        return doing.result()
    finally:
        doing.cancel()
        gone.cancel()
        await asyncio.gather(doing, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection. The body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
