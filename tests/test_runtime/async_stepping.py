"""Engines for asyncio, and a gate that holds their steps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from furiosa_build.runtime.async_engine import AsyncLLMEngine
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.engine_args import AsyncEngineArgs
from furiosa_build.runtime.request import RequestOutput
from furiosa_build.runtime.sampling.params import SamplingParams

from .stepping import greedy

# Longer than any test takes, so that a failure is one instead of a hang.
PATIENCE_S = 120


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))  # type: ignore[arg-type]


async def collect(engine: AsyncLLMEngine, prompt: Any, request_id: str, params: SamplingParams) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, request_id)]


async def tokens(engine: AsyncLLMEngine, prompt: Any, request_id: str, max_tokens: int = 12) -> list[int]:
    outputs = await collect(engine, prompt, request_id, greedy(max_tokens))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs[-1].outputs[0].token_ids


@asynccontextmanager
async def started(artifact: Path, **arguments: Any) -> AsyncIterator[tuple[AsyncLLMEngine, LLMEngine]]:
    """An engine, and the one within. At the end nothing is under way, and every block is free."""
    inner = LLMEngine.from_engine_args(AsyncEngineArgs(model=str(artifact), **arguments))
    async with AsyncLLMEngine(lambda: inner) as engine:
        yield engine, inner
        await engine.abort("unknown")  # comes after all that was ordered before
        assert not inner.has_unfinished_requests()
        inner.check_integrity()
        for replica in inner._replicas:
            assert replica.scheduler.blocks.num_free == replica.scheduler.blocks.num_blocks
    assert not {"engine", "element 0"} & {thread.name for thread in threading.enumerate()}


class Gate:
    """Holds the engine's thread before its next step, so that what a test does meanwhile is done in time.

    `after`: how many steps it takes before that.
    """

    def __init__(self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
        self._free = after
        self._step, self.open, self.reached = engine.step, threading.Event(), threading.Event()
        monkeypatch.setattr(engine, "step", self.step)

    def step(self) -> list[RequestOutput]:
        self._free -= 1
        if self._free >= 0:
            return self._step()
        self.reached.set()
        assert self.open.wait(PATIENCE_S)
        return self._step()
