"""Runs a server: loads the model while it listens already, and ends when all requests are answered."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.core import failpoints
from furiosa_build.core.errors import UserError
from furiosa_build.runtime.async_engine import AsyncLLMEngine
from furiosa_build.runtime.engine_args import AsyncEngineArgs
from furiosa_build.server import logs, sampling_defaults
from furiosa_build.server.app import create_app
from furiosa_build.server.http.connection import connection
from furiosa_build.server.options import ServerOptions
from furiosa_build.server.service import Service

logger = logging.getLogger("furiosa_build.server")


def serve(artifact: Callable[[], str | Path], options: ServerOptions) -> None:
    """Serves an artifact until SIGTERM or SIGINT, then drains. A second signal aborts what is in flight.

    Args:
        artifact: Finds its directory, or builds it, which may take hours: called when nothing else can be refused.
        options: The server's options.

    Raises:
        UserError: The artifact cannot be used, or an option is not valid.
        VerificationError: The artifact is not signed with `options.public_key`.
    """
    service = Service(options)
    config = _configuration(service, options)
    _listen(options).close()
    args = options.engine_args(artifact())
    opened = args.open()  # to refuse before anything listens
    service.sampling_defaults = sampling_defaults.read(opened.directory / "model", options.generation_config)
    logs.set_up()
    with _listen(options) as listening:
        host, port = listening.getsockname()[:2]
        scheme = "https" if options.ssl_certfile else "http"
        logger.info("listening", extra={"fields": {"url": f"{scheme}://{host}:{port}{options.root_path}"}})
        failed = asyncio.run(_Server(config, service).run_with(listening, partial(_load, args, opened)))
    if failed is not None:
        raise failed


def _configuration(service: Service, options: ServerOptions) -> uvicorn.Config:
    config = uvicorn.Config(
        create_app(service, options.api_keys()),
        root_path=options.root_path,
        timeout_keep_alive=options.timeout_keep_alive,
        timeout_graceful_shutdown=1,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        log_config=None,
        access_log=False,
        server_header=True,
        http=connection(options.request_timeout_s),
        lifespan="off",
        ws="none",
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise UserError(f"the TLS files cannot be used: {error}", where="ssl_certfile") from error
    return config


def _listen(options: ServerOptions) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        what = f"{options.host}:{options.port} cannot be listened on: {error}"
        raise UserError(what, where="host, port", hint="give another --port") from error


class _Server(uvicorn.Server):
    """uvicorn's, but it drains before it stops listening, so that `/health` can say so, and then ends with 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run_with(self, listening: socket.socket, load: Callable[[], AsyncLLMEngine]) -> Exception | None:
        """Listens, loads, serves. Returns why the engine could not be loaded, if so."""
        self._loop = asyncio.get_running_loop()
        loading = asyncio.create_task(self._load(load))
        await self.serve(sockets=[listening])
        has_ended = loading.done() and await self._service.shutdown()
        logger.info("ended")
        if not has_ended:
            # Python would wait for the thread that loads, or takes a step, which may be a while.
            os._exit(0)
        return loading.result()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signals' handler."""
        del frame
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._begin_to_end, signal.Signals(sig).name)

    def _begin_to_end(self, why: str) -> None:
        if self._drain is None:
            logger.info("draining", extra={"fields": {"signal": why}})
            self._drain = asyncio.create_task(self._end())
        else:
            self._service.aborting.set()

    async def _end(self) -> None:
        await self._service.drain()
        self.should_exit = True

    async def _load(self, load: Callable[[], AsyncLLMEngine]) -> Exception | None:
        try:
            engine = await asyncio.to_thread(load)
        except Exception as error:
            self.should_exit = True
            return error
        self._service.start(engine)
        loaded = {"model": self._service.model_name, "artifact_id": engine.artifact.metadata.artifact_id}
        logger.info("ready", extra={"fields": loaded})
        return None


def _load(args: AsyncEngineArgs, opened: OpenArtifact) -> AsyncLLMEngine:
    with failpoints.doing("serve"):
        failpoints.reach("load")
    return AsyncLLMEngine.from_engine_args(args, opened=opened)
