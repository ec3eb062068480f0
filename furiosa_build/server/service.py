"""The state of a server: whether it is ready, what it runs on, who is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from furiosa_build.runtime.async_engine import AsyncLLMEngine
from furiosa_build.runtime.tokenizer import Tokenizer
from furiosa_build.server.errors import ApiError, overloaded, unavailable
from furiosa_build.server.metrics import Metrics
from furiosa_build.server.options import ServerOptions

CUT_TIMEOUT_S = 2.0
"""For those that are cut, to tell their clients."""


class Service:
    """What all routes share.

    Args:
        options: Of the server.

    Attributes:
        phase: `loading` until there is an engine, `draining` from SIGTERM on.
        metrics: Of this server.
    """

    def __init__(self, options: ServerOptions) -> None:
        self.options = options
        self.phase: Literal["loading", "ready", "draining"] = "loading"
        self.metrics = Metrics(lambda: None if self._engine is None else self._engine.stats)
        self._engine: AsyncLLMEngine | None = None
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.cut = asyncio.Event()
        """Set when the time to drain is over: what runs then ends."""

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
            raise ApiError(400, "the artifact has no tokenizer, so it takes token ids only")
        return self.engine.tokenizer

    @property
    def model_name(self) -> str:
        """The name that requests call the model by."""
        return self.options.served_model_name or self.engine.artifact.metadata.name

    def check_model(self, name: str | None) -> None:
        """Raises ApiError (404) for the name of another model."""
        if name is not None and name != self.model_name:
            message = f"there is no model {name!r}; this server has {self.model_name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def start(self, engine: AsyncLLMEngine) -> None:
        """The engine is loaded."""
        self._engine = engine
        if self.phase == "loading":
            self.phase = "ready"

    async def drain(self) -> None:
        """Takes no new requests, and waits for those under way; after `drain_timeout_s` they are cut."""
        self.phase = "draining"
        try:
            await asyncio.wait_for(self._idle.wait(), self.options.drain_timeout_s)
        except TimeoutError:
            self.cut.set()
            # A client that does not read holds its request up; it is not waited for.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), CUT_TIMEOUT_S)

    async def shutdown(self) -> None:
        """Ends the engine."""
        if self._engine is not None:
            await self._engine.shutdown()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests in flight. Raises ApiError: 429 if there is none, 503 if not ready."""
        if self.phase == "draining":
            raise unavailable("the server is shutting down")
        _ = self.engine
        if self._in_flight >= self.options.max_requests_in_flight:
            raise overloaded(f"{self._in_flight} requests are in flight, no more are taken")
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()
