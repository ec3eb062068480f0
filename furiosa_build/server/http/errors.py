"""Errors as OpenAI's API has them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from furiosa_build.core.errors import EngineFullError, UserError
from furiosa_build.runtime.async_engine import EngineDeadError

RETRY_AFTER_S = 1

_OBJECT = re.compile(r"a valid dictionary(?: or instance of \w+)?")
"""What pydantic calls JSON's objects."""

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class ApiError(HTTPException):
    """An error response.

    Args:
        status: The HTTP status.
        message: A message for people.
        param: The request's field that is wrong.
        code: A name for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.message, self.param, self.code = message, param, code

    @property
    def content(self) -> dict[str, Any]:
        """The body."""
        default = "server_error" if self.status_code >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status_code, default)
        named = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        # What a request contains may not be encodable in UTF-8.
        return {"error": {key: text and text.encode(errors="replace").decode() for key, text in named.items()}}

    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.content, self.status_code, self.headers)

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """The same error about the field that the client wrote, where the engine has another name for it."""
        if self.param is None or self.param not in names:
            return self
        name = names[self.param]
        # "The prompt", with the article, is no name of a field.
        message = re.sub(rf"(?<!the )\b{re.escape(self.param)}\b", lambda _: name, self.message)
        return ApiError(self.status_code, message, param=name, code=self.code, headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error 400."""
    return ApiError(400, message, param=param, code=code)


def invalid_request(errors: Sequence[Mapping[str, Any]], body: Any = None) -> ApiError:
    """The error 400 for pydantic's errors about a body, at the place in it that the client wrote.

    Where a field takes one of several types, pydantic tells what is wrong with it as each of them: those are shown that
    got furthest, those of another type of object than is known first, and where the type
    is right, what is wrong with the value.
    """
    places = [(_place(error, body), error) for error in errors]
    deepest = max(places, key=lambda place: (len(place[0]), place[1]["type"] == "literal_error"))[0]
    param = ".".join(map(str, deepest))
    there = [error for place, error in places if place == deepest]
    there = [error for error in there if not error["type"].endswith("_type")] or there
    messages = dict.fromkeys(_OBJECT.sub("an object", error["msg"]) for error in there)
    first, *others = messages
    message = " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
    code = str(there[0]["type"])
    return bad_request(f"{param}: {message}" if param else message, param or None, code)


def _place(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Where an error is, without what pydantic puts between: the names of types."""
    place: list[str | int] = []
    is_missing = error["type"] == "missing"
    for part in error["loc"][:-1] if is_missing else error["loc"]:
        within = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if within:
            place.append(part)
            body = body[part]
    return [*place, error["loc"][-1]] if is_missing else place


def timed_out(seconds: float) -> ApiError:
    """The error 408. OpenAI's client would retry it, unless told not to."""
    message = f"the request took longer than {seconds} s"
    return ApiError(408, message, code="timeout", headers={"x-should-retry": "false"})


def overloaded(message: str) -> ApiError:
    """The error 429, with when to retry."""
    return ApiError(429, message, code="overloaded", headers={"Retry-After": str(RETRY_AFTER_S)})


def unavailable(message: str) -> ApiError:
    """The error 503, with when to retry."""
    return ApiError(503, message, code="unavailable", headers={"Retry-After": str(RETRY_AFTER_S)})


def api_error(error: BaseException) -> ApiError:
    """The error response to any exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineFullError):
        return overloaded(error.what)
    if isinstance(error, UserError):
        param, message = _param(error.where), _without_place(error)
        return bad_request(message if param is None or param in message else f"{param}: {message}", param)
    if isinstance(error, EngineDeadError):
        return unavailable(str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "internal server error", code="internal_error")


def _param(where: str) -> str | None:
    """The field of a request, by the engine's name of it, that an error of the engine is about."""
    name = re.sub(r"^(Sampling|Pooling)Params\.", "", where)
    if name != where:
        return name
    places = {"response_format": "response_format", "messages": "messages", "prompt": "prompt", "request": "prompt"}
    return places.get(re.split(r"\W", where)[0])


def _without_place(error: UserError) -> str:
    """The message without where it was found, which says nothing to who sent a request."""
    more = [f"  {label}: {text}" for label, text in (("valid", error.valid), ("hint", error.hint)) if text]
    return "\n".join([error.what, *more])


def add_handlers(app: FastAPI) -> None:
    """Gives every error response of `app` this shape."""

    async def invalid(_: Request, __: RequestValidationError) -> JSONResponse:
        # Bodies are validated where they are decoded, so what FastAPI finds is that there is none.
        return bad_request("the request has no body", code="missing").response()

    async def other(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, other)
    app.add_exception_handler(UserError, other)
    app.add_exception_handler(EngineDeadError, other)
