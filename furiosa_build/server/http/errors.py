"""Errors as OpenAI's API has them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from furiosa_build.core.errors import EngineFullError, UserError
from furiosa_build.runtime.async_engine import EngineDeadError

RETRY_AFTER_S = 1

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


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error 400."""
    return ApiError(400, message, param=param, code=code)


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The error 400 for the first of pydantic's errors."""
    first = errors[0]
    param = ".".join(str(part) for part in first["loc"] if part != "body") or None
    return bad_request(f"{param}: {first['msg']}" if param else first["msg"], param, first["type"])


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
        return bad_request(str(error), _param(error.where))
    if isinstance(error, EngineDeadError):
        return unavailable(str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "internal server error", code="internal_error")


def _param(where: str) -> str | None:
    """The field of a request that an error of the engine is about."""
    if where.startswith(("response_format", "SamplingParams.guided_json")):
        return "response_format"
    return where.removeprefix("SamplingParams.") if where.startswith("SamplingParams.") else None


def add_handlers(app: FastAPI) -> None:
    """Gives every error response of `app` this shape."""

    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return invalid_request(error.errors()).response()

    async def other(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    app.add_exception_handler(RequestValidationError, invalid)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, other)
    app.add_exception_handler(UserError, other)
    app.add_exception_handler(EngineDeadError, other)
