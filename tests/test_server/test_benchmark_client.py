"""What vLLM's serving benchmark (`vllm bench serve`) sends by default, and what it reads of the answers.

The client itself is a part of vLLM, and cannot be installed alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from .process import Server

LENGTH = 7
STREAM = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
TEXT = {"repetition_penalty": 1.0, "max_tokens": LENGTH, "logprobs": None, **STREAM}
CHAT = {"max_completion_tokens": LENGTH, **STREAM}


@pytest.fixture(scope="module")
def client(running: Server) -> Iterator[httpx.Client]:
    """Each benchmark's request names itself, and sends the key `None` where there is none."""
    with running.http as http:
        http.headers.update({"Authorization": "Bearer None", "x-request-id": "bench-0"})
        yield http


@pytest.fixture(scope="module")
def model(client: httpx.Client) -> str:
    """Where no model is named: the first that there is, and where its tokenizer comes from."""
    [first] = client.get("/v1/models").json()["data"]
    assert first["root"]
    return str(first["id"])


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    parts = [part.removeprefix("data: ") for part in answer.text.strip().split("\n\n")]
    assert parts.pop() == "[DONE]"
    return [json.loads(part) for part in parts]


@pytest.mark.parametrize("prompt", ["It was a dark", [5, 6, 7, 8]])
def test_completions(client: httpx.Client, model: str, prompt: Any) -> None:
    *chunks, last = events(client, "/v1/completions", {"model": model, "prompt": prompt, **TEXT})
    assert all(isinstance(chunk["choices"][0]["text"], str) for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], LENGTH)


def test_chats(client: httpx.Client, model: str) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "It was a dark"}]}
    *chunks, last = events(client, "/v1/chat/completions", {"model": model, "messages": [message], **CHAT})
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], LENGTH)


def test_responses(client: httpx.Client, model: str) -> None:
    body = {"model": model, "input": "It was a dark", "max_output_tokens": LENGTH, "stream": True, "store": False}
    answer = client.post("/v1/responses", json=body | {"ignore_eos": True})
    assert answer.status_code == 200, answer.text
    data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
    *_, last = map(json.loads, data)
    assert last["response"]["usage"]["output_tokens"] == LENGTH


def test_embeddings_and_ranks(client: httpx.Client, model: str) -> None:
    truncated = {"model": model, "truncate_prompt_tokens": -1}
    for path, body in (
        ("/v1/embeddings", {"input": "It was a dark"}),
        ("/v1/rerank", {"query": "It was", "documents": ["a dark", "night"]}),
    ):
        answer = client.post(path, json=truncated | body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["prompt_tokens"] > 0


def test_prompts_are_cut_as_the_server_counts_their_tokens(client: httpx.Client, model: str) -> None:
    body = {"model": model, "prompt": "It was a dark and stormy night", "add_special_tokens": False}
    tokens = client.post("/tokenize", json=body).json()["tokens"]
    cut = client.post("/detokenize", json={"model": model, "tokens": tokens[:3]}).json()["prompt"]
    assert body["prompt"].startswith(cut)
    assert client.get("/metrics").status_code == 200
