"""Bodies of requests: JSON as RFC 8259 has it, and nothing that readers understand differently."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import jiter
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from furiosa_build.server.http.errors import ApiError, bad_request


class JsonRoute(APIRoute):
    """A route whose body is read strictly.

    Refused, unlike by Python's own reader: a name twice in an object, NaN and infinities, encodings other than UTF-8,
    halves of surrogate pairs.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return strict


class _StrictRequest(Request):
    async def body(self) -> bytes:
        body = await super().body()
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and kind != "application/json":
            raise ApiError(415, f"the body is {kind or 'of no stated type'}; it must be application/json")
        return body

    async def json(self) -> Any:
        try:
            # No cache: it would keep what users write.
            return jiter.from_json(await self.body(), allow_inf_nan=False, catch_duplicate_keys=True, cache_mode="none")
        except ValueError as error:
            raise bad_request(f"the body is no JSON: {error}", code="json_invalid") from error
