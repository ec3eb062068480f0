"""Routes that take a body: a request is admitted before its body is decoded, and decoding is not for the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import jiter
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import Message, Receive, Scope, Send

from furiosa_build.server.http.errors import ApiError, bad_request, invalid_request
from furiosa_build.server.http.middleware import log_fields
from furiosa_build.server.service import Service

SMALL_BYTES = 16384
"""A body of so many bytes is decoded and validated within a millisecond, which is not worth another thread."""


def json_route(service: Service) -> type[APIRoute]:
    """The class of a server's routes.

    A request with a body is one of the requests in flight from when the body has come to when its answer has gone.
    `request.state.admitted_as` is the id that no other of them has.
    """

    class JsonRoute(APIRoute):
        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            if self.body_field is None or scope["method"] not in (self.methods or ()):
                await super().handle(scope, receive, send)
                return
            body = await Request(scope, receive).body()
            with service.admit(log_fields(scope)["request_id"]) as name:
                scope.setdefault("state", {})["admitted_as"] = name
                await super().handle(scope, _replay(body, receive), send)

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()
            model: Any = None if self.body_field is None else self.body_field.field_info.annotation

            async def strict(request: Request) -> Response:
                return await handler(_StrictRequest(request.scope, request.receive, model))

            return strict

    return JsonRoute


def _replay(body: bytes, receive: Receive) -> Receive:
    """Replays a body that has been received, then receives what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


class _StrictRequest(Request):
    """A request whose body is read strictly, and validated in the thread that decodes it.

    Refused, unlike by Python's own reader: a name twice in an object, NaN and infinities, encodings other than UTF-8,
    halves of surrogate pairs.
    """

    def __init__(self, scope: Scope, receive: Receive, model: type[BaseModel] | None) -> None:
        super().__init__(scope, receive)
        self._model = model

    async def body(self) -> bytes:
        body = await super().body()
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind != "application/json":
            raise ApiError(415, f"the body must be application/json, not {kind or 'of an unstated type'}")
        return body

    async def json(self) -> Any:
        """The body's model, which FastAPI then finds valid as it is."""
        body = await self.body()
        if len(body) <= SMALL_BYTES:
            return _decode(body, self._model)
        return await asyncio.to_thread(_decode, body, self._model)


def _decode(body: bytes, model: type[BaseModel] | None) -> Any:
    try:
        # No cache: it would keep what users write.
        value = jiter.from_json(body, allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="none")
    except ValueError as error:
        raise bad_request(f"the body is invalid JSON: {error}", code="json_invalid") from error
    if model is None:
        return value
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False)) from error
