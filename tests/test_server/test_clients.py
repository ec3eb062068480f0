"""Clients that come in crowds, leave early or do not read: others do not notice."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPResponse, IncompleteRead
from pathlib import Path
from typing import Any, Self

import pytest

from furiosa_build.runtime import LLM, SamplingParams

from . import malformed
from .process import PATIENCE_S, Server, answer, server

PROMPTS = ["It was a", "The sea", "Once upon a", "He had"]
TOKENS = 12
LARGE: dict[str, Any] = {
    "model": "test",
    "messages": [{"role": "user", "content": "Hello"}],
    "n": 2,
    "max_tokens": 900,
    "ignore_eos": True,
    "temperature": 0,
    "logprobs": True,
    "top_logprobs": 20,
    "stream": True,
}
"""A stream of some 2 kB a token."""
PLACES = 8


@pytest.fixture(scope="module")
def alone(chat_artifact: Path) -> dict[str, str]:
    """What follows each prompt when nothing else is under way."""
    llm, params = LLM(chat_artifact), SamplingParams(temperature=0, max_tokens=TOKENS)
    return {prompt: llm.generate([prompt], params)[0].outputs[0].text for prompt in PROMPTS}


@pytest.fixture(scope="module")
def narrow(chat_artifact: Path) -> Iterator[Server]:
    """A server with few places."""
    with server(chat_artifact, "--max-requests-in-flight", str(PLACES)) as started:
        started.wait_for("ready")
        yield started


def asked(prompt: str) -> bytes:
    """A request for a text."""
    body = {"model": "test", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    return malformed.http("/v1/completions", json.dumps(body).encode())


def chat(body: dict[str, Any]) -> bytes:
    return malformed.http("/v1/chat/completions", json.dumps(body).encode())


def answers(server: Server, prompts: Sequence[str]) -> list[tuple[HTTPResponse, dict[str, Any]]]:
    """What is answered to each prompt. All are asked before an answer is read."""
    connections = [server.connect() for _ in prompts]
    for connection, prompt in zip(connections, prompts, strict=True):
        connection.sendall(asked(prompt))
    found = []
    for connection in connections:
        with connection:
            head, body = answer(connection)
            found.append((head, json.loads(body)))
    return found


def texts(server: Server, prompts: Sequence[str]) -> list[str]:
    """What follows each prompt, all asked at once."""
    bodies = [body for _, body in answers(server, prompts)]
    assert all("choices" in body for body in bodies), bodies
    return [body["choices"][0]["text"] for body in bodies]


class Reader:
    """A client whose system takes hardly more from the server than the client reads.

    What it has not read stays at the server: the connection holds some 30 kB, uvicorn another 64.
    """

    def __init__(self, server: Server, body: dict[str, Any] = LARGE) -> None:
        small = socket.socket()
        small.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self._socket = server.connect(small)
        self._socket.sendall(chat(body))
        self.answer = HTTPResponse(self._socket)
        self.answer.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.answer.close()
        self._socket.close()


def test_one_that_leaves_mid_stream(narrow: Server, alone: dict[str, str]) -> None:
    with ThreadPoolExecutor(1) as pool:
        with Reader(narrow) as leaving:
            leaving.answer.readline()
            others = pool.submit(texts, narrow, PROMPTS)
        assert others.result(PATIENCE_S) == list(alone.values())
    narrow.wait_until_idle()
    assert narrow.wait_for("request", finish_reasons=["abort"] * 2)["generated_tokens"] < 2 * LARGE["max_tokens"]


def test_one_that_does_not_read(narrow: Server, alone: dict[str, str]) -> None:
    tokens = 120
    with Reader(narrow, LARGE | {"max_tokens": tokens}) as slow:
        first = slow.answer.readline()
        assert texts(narrow, PROMPTS) == list(alone.values())
        narrow.wait_until_idle()  # its texts have ended as well, and their blocks are free, though nobody reads them
        lines = (first + slow.answer.read()).decode().split("\n\n")
    narrow.wait_for("request", path="/v1/chat/completions", status=200, finish_reasons=["length"] * 2)
    assert lines[-2] == "data: [DONE]"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-2]]
    of_each = [[choice for choice in choices if choice["index"] == index] for index in (0, 1)]
    for parts in of_each:
        assert sum(len(part["logprobs"]["content"]) for part in parts) == tokens
        # The server did not keep an event for every token that was not read, but the newest state of the text.
        assert len(parts) < tokens / 2
    first_text, second_text = ("".join(part["delta"]["content"] for part in parts) for parts in of_each)
    assert first_text == second_text


def test_a_crowd_gets_right_texts_or_is_told_to_come_again(narrow: Server, alone: dict[str, str]) -> None:
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(200)]
    taken = 0
    for prompt, (head, body) in zip(prompts, answers(narrow, prompts), strict=True):
        if head.status == 200:
            taken += 1
            assert body["choices"][0]["text"] == alone[prompt]
        else:
            assert (head.status, body["error"]["type"]) == (429, "rate_limit_error")
            assert int(head.headers["Retry-After"]) > 0
    assert PLACES <= taken < len(prompts)
    narrow.wait_until_idle()

    with ExitStack() as stack:  # every place is free again, and there is not one more
        for _ in range(PLACES):  # a text that has ended, and is not taken, keeps its place
            assert stack.enter_context(Reader(narrow, LARGE | {"n": 1, "max_tokens": 100})).answer.status == 200
        [(head, _)] = answers(narrow, PROMPTS[:1])
        assert head.status == 429
    narrow.wait_until_idle()
    assert texts(narrow, PROMPTS) == list(alone.values())


@pytest.fixture(scope="module")
def hasty(chat_artifact: Path) -> Iterator[Server]:
    """A server whose time for a request is too short for LARGE."""
    limits = ("--request-timeout-s", "1", "--max-requests-in-flight", "2", "--max-processing-samples", "3")
    with server(chat_artifact, *limits) as started:
        started.wait_for("ready")
        yield started


def test_a_text_that_takes_too_long(hasty: Server, alone: dict[str, str]) -> None:
    with hasty.connect() as long:
        long.sendall(chat(LARGE | {"stream": False}))
        assert texts(hasty, PROMPTS[:1]) == [alone[PROMPTS[0]]]
        head, body = answer(long)
    assert (head.status, json.loads(body)["error"]["code"]) == (408, "timeout")
    assert head.headers["x-should-retry"] == "false"
    with hasty.connect() as long:
        long.sendall(chat(LARGE))
        head, body = answer(long)
    assert head.status == 200  # it has begun
    assert json.loads(body.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]["code"] == "timeout"
    hasty.wait_until_idle()


@pytest.mark.parametrize("comes_first", [b"", malformed.http("/tokenize", b'{"prompt": "It"}')])
def test_a_head_that_does_not_come(hasty: Server, comes_first: bytes) -> None:
    with hasty.connect() as stalled:
        if comes_first:
            stalled.sendall(comes_first)
            first = HTTPResponse(stalled)
            first.begin()
            first.read()
        stalled.sendall(b"POST /generate HTTP/1.1\r\nHost:")
        head, body = answer(stalled)
    assert (head.status, json.loads(body)["error"]["code"]) == (408, "timeout")


def test_a_connection_without_a_request(hasty: Server) -> None:
    with hasty.connect() as idle:
        assert idle.recv(1) == b""


def test_a_body_that_does_not_come(hasty: Server) -> None:
    with hasty.connect() as stalled:
        stalled.sendall(malformed.http("/generate", b"", length=10))
        head, body = answer(stalled)
    assert (head.status, json.loads(body)["error"]["code"]) == (408, "timeout")


def test_an_answer_that_nobody_takes(hasty: Server, alone: dict[str, str]) -> None:
    with Reader(hasty) as unread:
        assert hasty.wait_for("request", path="/v1/chat/completions", cut_off=True)["status"] == 200
        with pytest.raises((ConnectionError, IncompleteRead)):
            unread.answer.read()
        assert texts(hasty, PROMPTS[:2]) == [alone[prompt] for prompt in PROMPTS[:2]]  # on both places


def test_more_texts_than_there_can_be(hasty: Server) -> None:
    with hasty.connect() as greedy:
        greedy.sendall(chat(LARGE | {"n": 4}))
        head, body = answer(greedy)
    assert (head.status, json.loads(body)["error"]["param"]) == (400, "n")
