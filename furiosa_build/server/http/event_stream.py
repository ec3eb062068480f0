"""Streams of server-sent events, whose first event decides the status."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from furiosa_build.server.generation import ClientGoneError, unless_gone
from furiosa_build.server.http.errors import api_error

DONE = "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """An event with JSON data."""
    return f"data: {json.dumps(content)}\n\n"


class _EventStream(StreamingResponse):
    """Closes its generator when the client goes, so that its texts are aborted at once."""

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not as the base does it: anyio would cancel what cleans up as well.
        async with aclosing(self._events):
            with suppress(ClientGoneError):
                await unless_gone(Request(scope, receive), self.stream_response(send))


async def respond(request: Request, events: AsyncGenerator[str, None]) -> StreamingResponse:
    """A response with these events.

    It begins with the first, so that what fails before has a status of its own. What fails later is an event.

    Raises:
        ClientGoneError: The client goes before the first event.
        Exception: What `events` raises before the first.
    """
    try:
        first = await unless_gone(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return _EventStream(_go_on(first, events))


async def _go_on(first: str, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        yield first
        try:
            async for each in events:
                yield each
        except Exception as error:
            yield event(api_error(error).content)
