"""Two thousand malformed requests, after which the server is as it was."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import malformed
from .malformed import MAX_BODY_BYTES, ROUTES, Malformed
from .process import Server, answer, server

NUMBER = 2000
SEED = 5


@pytest.fixture(scope="module")
def small(chat_artifact: Path) -> Iterator[Server]:
    """A server that takes small bodies, and no fields that it does not know."""
    strict = ("--max-body-bytes", str(MAX_BODY_BYTES), "--strict-requests", "true")
    with server(chat_artifact, *strict) as started:
        started.wait_for("ready")
        yield started


def ask(server: Server, request: Malformed) -> tuple[int, bytes]:
    """The status and the body of the answer."""
    with server.connect() as connection:
        connection.sendall(request.data)
        if request.ends:
            connection.shutdown(socket.SHUT_WR)
        head, body = answer(connection)
        return head.status, body


def fill_pool(server: Server) -> None:
    """Has the server's pool of threads, which encode texts, grow to its size: all ask before one is answered."""
    body = json.dumps({"prompt": "word " * 3000}).encode()
    connections = [server.connect() for _ in range(64)]
    for connection in connections:
        connection.sendall(malformed.http("/tokenize", body))
    for connection in connections:
        with connection:
            head, _ = answer(connection)
            assert head.status == 200


def holdings(server: Server) -> dict[str, float]:
    """What requests must leave as they found it."""
    process = Path("/proc") / str(server.process.pid)
    return {
        "blocks": server.metric("furiosa_kv_blocks_used"),
        "waiting": server.metric("furiosa_waiting"),
        "tasks": server.metric("furiosa_tasks"),
        "threads": len(list((process / "task").iterdir())),
        "file handles": len(list((process / "fd").iterdir())),
    }


def settled(server: Server) -> dict[str, float]:
    """`holdings`, when they have stayed the same for a while: a task may outlive its answer by a turn of the loop."""
    found: list[dict[str, float]] = []
    while len(found) < 5 or found[-5:] != found[-1:] * 5:
        found.append(holdings(server))
        assert len(found) < 1000, found[-5:]
    return found[-1]


def test_malformed_requests_are_refused_and_leave_nothing(small: Server) -> None:
    # What is malformed is so by its kind alone: as they are, these are answered.
    valid = [Malformed("", malformed.http(path, json.dumps(body).encode())) for path, body in ROUTES.items()]
    assert [ask(small, request)[0] for request in valid] == [200] * len(valid)
    fill_pool(small)
    before = settled(small)

    for request in malformed.requests(NUMBER, SEED):
        status, body = ask(small, request)
        told = (request.kind, request.data[:300], status, body[:300])
        assert 400 <= status < 500, told
        error = json.loads(body)["error"]
        assert set(error) == {"message", "type", "param", "code"}, told
        assert error["message"], told

    assert settled(small) == before
    assert [ask(small, request)[0] for request in valid] == [200] * len(valid)
    ask(small, Malformed("", malformed.http("/v1/none", b"", **{"X-Request-Id": "last"})))
    small.wait_for("request", request_id="last")
    assert [line for line in small.log if line["level"] == "error"] == []
