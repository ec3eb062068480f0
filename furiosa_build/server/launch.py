"""Starts a server, where what it needs is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from furiosa_build.core.errors import UserError
from furiosa_build.server.options import ServerOptions


def launch(artifact: Callable[[], str | Path], options: ServerOptions) -> None:
    """`serve.serve`, where the extra is installed. Raises UserError where it is not, and as `serve.serve`."""
    try:
        from furiosa_build.server.serve import serve
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "jiter", "prometheus_client", "starlette", "uvicorn"):
            raise
        hint = "pip install 'furiosa-build[serve]'"
        raise UserError(f"serving needs the extra `serve`: {error}", where="serve", hint=hint) from error
    serve(artifact, options)
