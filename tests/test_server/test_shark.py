"""shark's routes, asked by curl as its guide does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from furiosa_build.runtime import LLM, SamplingParams

from .process import PATIENCE_S, Server

TEXTS = ["It was a", "The sea"]


def curl(*arguments: str) -> str:
    command = ["curl", "-sS", "--noproxy", "*", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout


def generate(server: Server, body: dict[str, object]) -> str:
    return curl(f"{server.url}/generate", "-H", "Content-Type: application/json", "-d", json.dumps(body))


@pytest.fixture(scope="module")
def expected(chat_artifact: Path) -> list[str]:
    outputs = LLM(chat_artifact).generate(TEXTS, SamplingParams(temperature=0, max_tokens=9))
    return [output.outputs[0].text for output in outputs]


def test_health_is_empty(running: Server) -> None:
    head, _, body = curl("-i", f"{running.url}/health").partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK")
    assert "content-length: 0" in head.lower()
    assert "server: uvicorn" in head.lower()
    assert body == ""


def test_a_text_is_answered_by_its_continuation(running: Server, expected: list[str]) -> None:
    assert generate(running, {"text": TEXTS[0], "sampling_params": {"max_completion_tokens": 9}}) == expected[0]


def test_a_list_is_answered_by_a_list(running: Server, expected: list[str]) -> None:
    answer = json.loads(generate(running, {"text": TEXTS, "sampling_params": {"max_completion_tokens": 9}}))
    assert [each["prompt"] for each in answer["responses"]] == TEXTS
    assert [each["responses"] for each in answer["responses"]] == [[{"text": text}] for text in expected]


def test_streams_name_their_prompts(running: Server, expected: list[str]) -> None:
    body = {"text": TEXTS, "sampling_params": {"max_completion_tokens": 9}, "stream": True, "rid": ["a", "b"]}
    *events, done, end = generate(running, body).split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    for name, text in zip("ab", expected, strict=True):
        head = f"data({name}): "
        assert "".join(event.removeprefix(head) for event in events if event.startswith(head)) == text


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "either text or input_ids"),
        ({"text": "x", "input_ids": [1]}, "either text or input_ids"),
        ({"text": TEXTS, "rid": ["a"]}, "1 names for 2 prompts"),
        ({"text": "x", "sampling_params": {"num_beams": 2}}, "num_beams"),
    ],
)
def test_mistakes(running: Server, body: dict[str, object], words: str) -> None:
    assert words in json.loads(generate(running, body))["error"]["message"]
