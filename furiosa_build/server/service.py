"""The state of a server: its phase, its engine, its requests in flight."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from furiosa_build.runtime.async_engine import AsyncLLMEngine
from furiosa_build.runtime.text.tokenizer import Tokenizer
from furiosa_build.server.http.errors import ApiError, overloaded, unavailable
from furiosa_build.server.metrics import Metrics
from furiosa_build.server.options import ServerOptions
from furiosa_build.server.sampling_defaults import SamplingDefaults

ABORT_TIMEOUT_S = 2.0
"""Seconds for aborted requests to tell their clients, and for the engine to end."""


class Service:
    """The state that all routes share.

    Args:
        options: The server's options.

    Attributes:
        phase: `loading` until there is an engine, `draining` from SIGTERM on.
        metrics: This server's metrics.
        sampling_defaults: Sampling parameters of requests to OpenAI's routes that give none.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.phase: Literal["loading", "ready", "draining"] = "loading"
        self.metrics = Metrics(lambda: None if self._engine is None else self._engine.stats)
        self._engine: AsyncLLMEngine | None = None
        self.sampling_defaults = SamplingDefaults()
        self._in_flight: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.aborting = asyncio.Event()
        """Set when the time to drain is over: requests in flight are then aborted."""

    @property
    def is_healthy(self) -> bool:
        """Whether requests are accepted."""
        return self.phase == "ready" and not self.engine.is_dead

    @property
    def engine(self) -> AsyncLLMEngine:
        """The engine. Raises ApiError (503) while there is none."""
        if self._engine is None:
            raise unavailable("the model is being loaded")
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ApiError if the artifact has none."""
        if self.engine.tokenizer is None:
            raise ApiError(400, "the artifact has no tokenizer, so it accepts token ids only")
        return self.engine.tokenizer

    @property
    def model_name(self) -> str:
        """The name that requests call the model by."""
        return self.options.served_model_name or self.engine.artifact.metadata.name

    @property
    def max_context(self) -> int:
        """The most tokens of a prompt and its text."""
        return self.engine.artifact.generator_config.max_seq_len_to_capture

    def longest_prompt(self, max_tokens: int | None) -> int:
        """The most tokens of a prompt that leaves room for so many more, or for one."""
        pipelines = self.engine.artifact.pipelines
        longest = max(pipeline.context_length for pipeline in pipelines if pipeline.phase != "decode")
        return max(1, min(longest, self.max_context - (max_tokens or 1)))

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for the name of another model."""
        if name is not None and name != self.model_name:
            message = f"the model {name!r} does not exist; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def start(self, engine: AsyncLLMEngine) -> None:
        """Takes requests from now on, for this engine."""
        self._engine = engine
        if self.phase == "loading":
            self.phase = "ready"

    async def drain(self) -> None:
        """Refuses new requests and waits for those in flight; aborts them after `drain_timeout_s`, or when told to."""
        self.phase = "draining"
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, self.aborting)]
        await asyncio.wait(waits, timeout=self.options.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not self._idle.is_set():
            self.aborting.set()
            # A client that does not read holds its request up; it is not waited for.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), ABORT_TIMEOUT_S)
        for each in waits:
            each.cancel()

    async def shutdown(self) -> bool:
        """Ends the engine. Returns whether it has ended in time; it ends after the step under way."""
        if self._engine is None:
            return True
        try:
            await asyncio.wait_for(self._engine.shutdown(), ABORT_TIMEOUT_S)
        except TimeoutError:
            return False
        return True

    @contextmanager
    def admit(self, request_id: str) -> Iterator[str]:
        """Counts a request as in flight. Gives an id that no other of them has: if possible, the given one.

        Raises:
            ApiError: 429 if as many are in flight as may be, 503 if the server is not ready.
        """
        if self.phase == "draining":
            raise unavailable("the server is shutting down")
        _ = self.engine
        if len(self._in_flight) >= self.options.max_requests_in_flight:
            raise overloaded(f"too many requests: {len(self._in_flight)} are in flight")
        own = uuid.uuid4().hex if request_id in self._in_flight else request_id
        self._in_flight.add(own)
        self._idle.clear()
        try:
            yield own
        finally:
            self._in_flight.remove(own)
            if not self._in_flight:
                self._idle.set()
