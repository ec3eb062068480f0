"""A server as a process of its own, on a free port of the loopback address."""

from __future__ import annotations

import json
import os
import queue
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from openai import OpenAI

PATIENCE_S = 60
"""Longer than anything takes, so that a failure is one instead of a hang."""


class Server:
    """A running server: its process, its address, its log."""

    def __init__(self, process: subprocess.Popen[str], certificate: Path | None = None) -> None:
        self.process = process
        self._verify = certificate is not None and ssl.create_default_context(cafile=certificate)
        self.log: list[dict[str, Any]] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.url = str(self.wait_for("listening")["url"])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, message: str, **fields: Any) -> dict[str, Any]:
        """The next line of the log with this message and these fields."""
        while (line := self._lines.get(timeout=PATIENCE_S)) is not None:
            if not line.startswith("{"):
                raise AssertionError(f"no line of the log: {line}{''.join(self.rest())}")
            entry = json.loads(line)
            self.log.append(entry)
            if entry["message"] == message and fields.items() <= entry.items():
                return dict(entry)
        raise AssertionError(f"the server ended with {self.process.wait(PATIENCE_S)} before {message!r}: {self.log}")

    def rest(self) -> Iterator[str]:
        """The lines until the process ends."""
        while (line := self._lines.get(timeout=PATIENCE_S)) is not None:
            yield line

    @cached_property
    def openai(self) -> OpenAI:
        """A client that does not try again. Closed with the server: errors that tests have caught hold on to it."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE_S)

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=PATIENCE_S, trust_env=False, verify=self._verify)

    def connect(self, connection: socket.socket | None = None) -> socket.socket:
        """A connection, through that socket if one is given."""
        connection = connection or socket.socket()
        connection.settimeout(PATIENCE_S)
        url = urlsplit(self.url)
        connection.connect((url.hostname, url.port))
        return connection

    def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        with self.connect() as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n")
            _, body = answer(connection)
        lines = body.decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].split(" ")[0] == name)

    def wait_until_idle(self) -> None:
        """Until the engine has no request, and all KV blocks are free. Asking takes time enough, so no sleeps."""
        for _ in range(2000):
            if not any(map(self.metric, ("furiosa_running", "furiosa_waiting", "furiosa_kv_blocks_used"))):
                return
        raise AssertionError("requests go on, or hold KV blocks")


def answer(connection: socket.socket) -> tuple[HTTPResponse, bytes]:
    """What is answered there, and its body. The server has closed its end of the connection then."""
    answer = HTTPResponse(connection)
    answer.begin()
    body = answer.read()
    with suppress(OSError):  # the server may have ended it already
        connection.shutdown(socket.SHUT_WR)
    with suppress(ConnectionError):  # where it did not read all that was sent
        while connection.recv(1024):
            pass
    return answer, body


@contextmanager
def server(
    target: Path | str,
    *options: str,
    environment: Mapping[str, str] | None = None,
    cli: str = "furiosa_llm",
    certificate: Path | None = None,
    **more: Any,
) -> Iterator[Server]:
    """A server that is being loaded; killed at the end.

    Args:
        target: What is served.
        options: Of the command line.
        environment: Beside this process's own.
        cli: The module of the command.
        certificate: The server's, if it speaks TLS.
        more: Of Popen.
    """
    code = f"from furiosa_build.cli.{cli} import main; main()"
    command = [sys.executable, "-c", code, "serve", str(target), "--port", "0", *options]
    all_of_it = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=all_of_it, **more)
    try:
        started = Server(process, certificate)
        with started.openai:
            yield started
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        if process.stderr is not None:
            process.stderr.close()
