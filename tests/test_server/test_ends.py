"""How a server begins and ends. Fault points hold it where a test wants to see it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from furiosa_build.runtime.async_engine import AsyncLLMEngine
from furiosa_build.runtime.engine_args import AsyncEngineArgs
from furiosa_build.server.app import create_app
from furiosa_build.server.options import ServerOptions
from furiosa_build.server.service import Service

from .process import PATIENCE_S, Server, server

LONG = {"model": "test", "prompt": "It was a", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
SHORT = LONG | {"max_tokens": 3}


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """Where a process that has come to a fault point says so. It waits there until something is in `pipe.go`."""
    for path in (tmp_path / "pipe", tmp_path / "pipe.go"):
        os.mkfifo(path)
    return tmp_path / "pipe"


def status(server: Server) -> int:
    with server.http as http:
        return http.get("/health").status_code


def assert_unavailable(server: Server) -> None:
    assert status(server) == 503
    with server.http as http:
        answer = http.post("/v1/completions", json=SHORT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert int(answer.headers["Retry-After"]) > 0


def test_it_listens_while_the_model_is_loaded_and_drains(chat_artifact: Path, pipe: Path) -> None:
    with server(
        chat_artifact, "--drain-timeout-s", "300", environment={"FURIOSA_BUILD_FAULT": f"serve@load={pipe}"}
    ) as started:
        pipe.read_text()
        assert_unavailable(started)
        with started.http as http:
            assert http.get("/metrics").status_code == http.get("/version").status_code == 200
        Path(f"{pipe}.go").write_text("go")
        started.wait_for("ready")
        assert status(started) == 200
        with started.http as http, http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            started.process.send_signal(signal.SIGTERM)
            started.wait_for("draining", signal="SIGTERM")
            assert_unavailable(started)
            assert list(lines)[-2] == "data: [DONE]"
        assert started.process.wait(PATIENCE_S) == 0


def test_sigterm_does_not_wait_for_the_model(chat_artifact: Path, pipe: Path) -> None:
    with server(chat_artifact, environment={"FURIOSA_BUILD_FAULT": f"serve@load={pipe}"}) as started:
        pipe.read_text()  # and there it stays
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(PATIENCE_S) == 0


def test_a_model_that_cannot_be_loaded_ends_it(chat_artifact: Path) -> None:
    with server(chat_artifact, environment={"FURIOSA_BUILD_FAULT": "serve@load=errno:ENOMEM"}) as started:
        assert started.process.wait(PATIENCE_S) == 1
        assert "Cannot allocate memory" in "".join(started.rest())


class Asking(threading.Thread):
    """A request whose step does not end: the step that `pipe` has said something of."""

    def __init__(self, server: Server, pipe: Path, **fields: Any) -> None:
        super().__init__(daemon=True)
        self._server, self._body = server, LONG | fields
        self.answer: httpx.Response | None = None
        self.start()
        pipe.read_text()

    def run(self) -> None:
        with self._server.http as http:
            self.answer = http.post("/v1/completions", json=self._body, headers={"X-Request-Id": "held"})

    def end(self) -> httpx.Response:
        self.join(PATIENCE_S)
        assert self.answer is not None
        return self.answer


def test_what_runs_is_cut_at_the_stated_time(chat_artifact: Path, pipe: Path) -> None:
    fault = {"FURIOSA_BUILD_FAULT": f"request:held-0@step={pipe}"}
    with server(chat_artifact, "--drain-timeout-s", "0.5", environment=fault) as started:
        started.wait_for("ready")
        asking = Asking(started, pipe)
        started.process.send_signal(signal.SIGTERM)
        began = started.wait_for("draining")
        answer = asking.end()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        line = started.wait_for("request", request_id="held")
        assert line["finish_reasons"] == ["abort"]
        seconds = (datetime.fromisoformat(line["time"]) - datetime.fromisoformat(began["time"])).total_seconds()
        assert 0.49 <= seconds < 30  # not before; soon after, on however slow a machine
        assert started.process.wait(PATIENCE_S) == 0  # though the step never ends


def test_a_second_signal_ends_it_at_once(chat_artifact: Path, pipe: Path) -> None:
    fault = {"FURIOSA_BUILD_FAULT": f"request:held-0@step={pipe}"}
    # Longer than the patience of any wait below.
    with server(chat_artifact, "--drain-timeout-s", "3600", environment=fault) as started:
        started.wait_for("ready")
        asking = Asking(started, pipe, stream=True)
        started.process.send_signal(signal.SIGTERM)
        started.wait_for("draining")
        assert asking.is_alive()
        started.process.send_signal(signal.SIGINT)
        assert "shutting down" in asking.end().text
        assert started.process.wait(PATIENCE_S) == 0


def test_an_engine_that_has_failed_is_not_healthy(chat_artifact: Path) -> None:
    async def statuses() -> list[int]:
        service = Service(ServerOptions())
        engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model=str(chat_artifact)))
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            found = [await http.get("/health")]
            service.start(engine)
            found.append(await http.get("/health"))
            await engine.shutdown()  # as it does itself when its state is inconsistent
            found += [await http.get("/health"), await http.post("/v1/completions", json=SHORT)]
        return [each.status_code for each in found]

    assert asyncio.run(statuses()) == [503, 200, 503, 503]
