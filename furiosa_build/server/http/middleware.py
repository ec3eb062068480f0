"""Middleware before every route: request ids, the log, API keys, limits of time and size."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import MutableMapping, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from furiosa_build.server.http.connection import abort
from furiosa_build.server.http.content_encoding import body_too_large
from furiosa_build.server.http.errors import ApiError, timed_out
from furiosa_build.server.metrics import Metrics

logger = logging.getLogger("furiosa_build.server")

GRACE_S = 2.0
"""Seconds that a client has, after the time limit, to take the end of its response."""

PART_BYTES = 65536
"""Bytes of a response that are passed on at a time; more follow when the client has read most of them."""

_FIELDS = "furiosa_build.log"
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def log_fields(scope: MutableMapping[str, Any]) -> dict[str, Any]:
    """The fields of this request's log line."""
    return scope.setdefault(_FIELDS, {})  # type: ignore[no-any-return]


class RequestLog:
    """Gives every request an id, its own `X-Request-Id` if it has a usable one, and a line in the log when it ends.

    An exception that no route has handled becomes a 500 here.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        fields = log_fields(scope)
        fields |= {"request_id": request_id, "method": scope["method"], "path": scope["path"], "status": None}
        started = time.monotonic()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                fields["status"] = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except Exception:
            logger.exception("a request failed", extra={"fields": {"request_id": request_id}})
            if fields["status"] is None:
                await ApiError(500, "internal server error").response()(scope, receive, answer)
        finally:
            fields["duration_s"] = round(time.monotonic() - started, 6)
            # Not the path itself: whoever asks for many would make as many time series.
            path = getattr(scope.get("route"), "path", "other")
            self._metrics.http.labels(path, fields["status"] or "none").inc()
            logger.info("request", extra={"fields": fields})


class Head:
    """Answers HEAD as GET; what is sent has no body, as the connection sees to."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return
        as_get = {**scope, "method": "GET"}
        try:
            await self._app(as_get, receive, send)
        finally:
            scope["route"] = as_get.get("route")


class ApiKeys:
    """Requires one of the keys, as `Authorization: Bearer KEY`, except for `/health`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not (_is_health(scope) or self._is_authorized(Headers(scope=scope))):
            error = ApiError(401, "no valid API key provided", code="invalid_api_key")
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_authorized(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key)
        # Digests, so that not even lengths can be told from the time; all, so that nothing tells which.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _is_health(scope: Scope) -> bool:
    return bool(scope["path"].removeprefix(scope.get("root_path", "")) == "/health")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


class TimeLimit:
    """Refuses bodies that do not arrive in time, and disconnects clients that do not read their response.

    A generation ends by itself in this time; a client has `GRACE_S` more to read what it was.
    """

    def __init__(self, app: ASGIApp, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_body = has_begun = False

        async def timed() -> Message:
            nonlocal has_body
            message = await receive()
            if not (has_body or message.get("more_body")):
                has_body = True
                limit.reschedule(asyncio.get_running_loop().time() + self._seconds + GRACE_S)
            return message

        async def answer(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            body = message.get("body", b"")
            last = max(len(body) - 1, 0) // PART_BYTES * PART_BYTES
            for begin in range(0, last, PART_BYTES):
                part = body[begin : begin + PART_BYTES]
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({**message, "body": body[last:]} if last else message)

        try:
            async with asyncio.timeout(self._seconds) as limit:
                await self._app(scope, timed, answer)
        except TimeoutError:
            if not limit.expired():
                raise
            if not has_begun:
                await timed_out(self._seconds).response()(scope, receive, send)
                return
            log_fields(scope)["cut_off"] = True
            abort(scope)
            while (await receive())["type"] != "http.disconnect":
                pass


class BodyLimit:
    """Refuses bodies of more bytes, with and without a Content-Length."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = body_too_large(self._max_bytes)
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            await too_large.response()(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise too_large
            return message

        await self._app(scope, counted, send)
