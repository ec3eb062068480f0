"""The state of a server: whether it is ready, what it runs on, who is under way."""

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
        self._in_flight: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.cut = asyncio.Event()
        """Set when the time to drain is over: what runs then ends."""

    @property
    def is_healthy(self) -> bool:
        """Whether requests are taken."""
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
        """Takes no new requests, and waits for those under way. After `drain_timeout_s`, or at `cut`, they end."""
        self.phase = "draining"
        waits = [asyncio.ensure_future(event.wait()) for event in (self._idle, self.cut)]
        await asyncio.wait(waits, timeout=self.options.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not self._idle.is_set():
            self.cut.set()
            # A client that does not read holds its request up; it is not waited for.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), CUT_TIMEOUT_S)
        for each in waits:
            each.cancel()

    async def shutdown(self) -> bool:
        """Ends the engine. Returns whether it has ended: it does not before the step under way does."""
        if self._engine is None:
            return True
        try:
            await asyncio.wait_for(self._engine.shutdown(), CUT_TIMEOUT_S)
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
            raise overloaded(f"{len(self._in_flight)} requests are in flight, no more are taken")
        own = uuid.uuid4().hex if request_id in self._in_flight else request_id
        self._in_flight.add(own)
        self._idle.clear()
        try:
            yield own
        finally:
            self._in_flight.remove(own)
            if not self._in_flight:
                self._idle.set()
