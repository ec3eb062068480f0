"""The application: all routes and middleware."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from starlette.requests import ClientDisconnect, Request

import furiosa_build
from furiosa_build.server.generation import ClientGoneError
from furiosa_build.server.http import errors
from furiosa_build.server.http.middleware import ApiKeys, BodyLimit, Head, RequestLog, TimeLimit
from furiosa_build.server.openai import descriptions
from furiosa_build.server.routes import openai, pooling, responses, shark
from furiosa_build.server.routes import service as service_routes
from furiosa_build.server.service import Service

CLIENT_GONE = 499
"""The status in the log for a client that disconnected before the response. It is never sent."""


def create_app(service: Service, api_keys: Sequence[str] = ()) -> FastAPI:
    """The application of a server; with no keys, everybody may use it."""
    # Pages of documentation would load scripts from elsewhere.
    app = FastAPI(
        title="furiosa-build",
        version=furiosa_build.__version__,
        docs_url=None,
        redoc_url=None,
        responses=descriptions.OF_ALL,
        # For the description only; see ApiKeys.
        dependencies=[Depends(HTTPBearer(auto_error=False))] if api_keys else None,
    )
    for routes in (openai, pooling, responses, shark, service_routes):
        app.include_router(routes.make_router(service))
    errors.add_handlers(app)

    async def gone(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    for error in (ClientGoneError, ClientDisconnect):
        app.add_exception_handler(error, gone)

    # The last is the outermost.
    app.add_middleware(Head)
    app.add_middleware(BodyLimit, max_bytes=service.options.max_body_bytes)
    app.add_middleware(TimeLimit, seconds=service.options.request_timeout_s)
    if api_keys:
        app.add_middleware(ApiKeys, keys=api_keys)
    if service.options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.options.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(RequestLog, metrics=service.metrics)
    return app
