"""Asking a server what clients ask it, in a line."""

from __future__ import annotations

from typing import Any

import httpx

from .process import Server

HELLO = [{"role": "user", "content": "Hello"}]
CHAT: dict[str, Any] = {"model": "test", "messages": HELLO, "max_tokens": 6, "temperature": 0}
TEXT: dict[str, Any] = {"model": "test", "prompt": "It was a", "max_tokens": 6, "temperature": 0}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}
MAX_BODY_BYTES = 4 * 1024 * 1024


def post(server: Server, path: str, body: dict[str, Any], **more: Any) -> httpx.Response:
    with server.http as http:
        return http.post(path, json=body, **more)


def choices(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"])


def text(server: Server, **fields: Any) -> str:
    """What follows a prompt."""
    return str(choices(post(server, "/v1/completions", TEXT | fields))[0]["text"])


def said(server: Server, **fields: Any) -> str:
    """The answer of a chat."""
    return str(choices(post(server, "/v1/chat/completions", CHAT | fields))[0]["message"]["content"])


def prompt_of(server: Server, **fields: Any) -> str:
    """A conversation as the model gets it."""
    with server.http as http:
        tokens = http.post("/tokenize", json={"messages": HELLO, **fields}).json()["tokens"]
        return str(http.post("/detokenize", json={"tokens": tokens}).json()["prompt"])
