"""Routes that take a body: a request is admitted before its body is decoded, and decoding is not for the event loop."""

from __future__ import annotations

import asyncio
import logging
from codecs import BOM_UTF8
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import jiter
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.types import Message, Receive, Scope, Send

from furiosa_build.core.errors import UserError
from furiosa_build.server.http.body import Body, unknown_fields
from furiosa_build.server.http.content_encoding import decoded
from furiosa_build.server.http.errors import ApiError, api_error, bad_request, invalid_request
from furiosa_build.server.http.middleware import log_fields
from furiosa_build.server.options import ServerOptions
from furiosa_build.server.service import Service

logger = logging.getLogger("furiosa_build.server")

T = TypeVar("T")

SMALL_BYTES = 16384
"""A body of so many bytes is decoded and validated within a millisecond, which is not worth another thread."""

IGNORED_FIELDS = "X-Ignored-Fields"
"""The header that names the fields of a request that are not known here."""

_MOST_NAMES, _LONGEST_NAME = 16, 64


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
                read = _StrictRequest(request, model, service.options)
                try:
                    response = await handler(read)
                except (ApiError, UserError) as error:
                    names = {} if read.value is None else read.value.engine_names
                    raise api_error(error).renamed(names) from error
                if read.unknown:
                    response.headers[IGNORED_FIELDS] = _as_header(read.unknown)
                return response

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

    Attributes:
        value: The body, when it has been read.
        unknown: The names of fields that are not known; the log tells them.
    """

    def __init__(self, request: Request, model: type[Body] | None, options: ServerOptions) -> None:
        super().__init__(request.scope, request.receive)
        self._model, self._options = model, options
        self._content: bytes | None = None
        self.value: Body | None = None
        self.unknown: list[str] = []

    async def body(self) -> bytes:
        """The body without its content encoding."""
        if self._content is None:
            body = await super().body()
            kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
            if body and kind != "application/json":
                raise ApiError(415, f"the body must be application/json, not {kind or 'of an unstated type'}")
            encoding = self.headers.get("content-encoding", "")
            self._content = await _work(len(body), decoded, body, encoding, self._options.max_body_bytes)
        return self._content

    async def json(self) -> Any:
        """The body's model, which FastAPI then finds valid as it is."""
        body = await self.body()
        self.value, self.unknown = await _work(len(body), _decode, body, self._model)
        if self.unknown and self._options.strict_requests:
            name = self.unknown[0]
            raise bad_request(f"{name}: there is no such field", name, "unknown_field")
        if self.unknown:
            ignored = {"request_id": log_fields(self.scope)["request_id"], "fields": self.unknown[:_MOST_NAMES]}
            logger.warning("fields that are not known are ignored", extra={"fields": ignored})
        return self.value


async def _work(size: int, function: Callable[..., T], *arguments: Any) -> T:
    """Calls a function of a body of so many bytes, off the event loop where that takes long."""
    if size <= SMALL_BYTES:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


def _decode(body: bytes, model: type[Body] | None) -> tuple[Any, list[str]]:
    """What a body has, and the names of the fields in it that are not known."""
    try:
        # No cache: it would keep what users write.
        value = jiter.from_json(
            body.removeprefix(BOM_UTF8), allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="none"
        )
    except ValueError as error:
        raise bad_request(f"the body is invalid JSON: {error}", code="json_invalid") from error
    if model is None:
        return value, []
    try:
        validated = model.model_validate(value)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False), value) from error
    return validated, unknown_fields(validated)


def _as_header(names: Sequence[str]) -> str:
    """Names as a header may have them: by commas, in ASCII, not too many, none too long."""
    shown = [quote(name[:_LONGEST_NAME], safe="!#$&'()*+./:;<=>?@[]^_`{|}~") for name in names[:_MOST_NAMES]]
    return ", ".join([name or '""' for name in shown] + ["..."] * (len(names) > _MOST_NAMES))
