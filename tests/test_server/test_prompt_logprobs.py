"""Log probabilities of prompts, asked for as OpenAI's and vLLM's clients do, and compared with transformers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from .conftest import MODEL as DIRECTORY
from .process import Server

MODEL = "test"
PROMPT = "It was a bright cold day"
TOLERANCE = 0.1
"""The model is bfloat16, so log probabilities are to 8 bits of its logits."""


@pytest.fixture(scope="module")
def logprobs_of() -> Callable[[list[int]], list[list[float]]]:
    """For each token of a prompt but the first, transformers' log probabilities of all tokens in its place."""
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)

    def logprobs(tokens: list[int]) -> list[list[float]]:
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1).tolist()

    return logprobs


def ask(server: Server, path: str = "/v1/completions", **fields: Any) -> dict[str, Any]:
    with server.http as http:
        response = http.post(path, json={"model": MODEL, "temperature": 0, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def tokens_of(server: Server, **fields: Any) -> list[int]:
    return ask_json(server, "/tokenize", fields)["tokens"]


def ask_json(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    with server.http as http:
        return http.post(path, json=body).json()


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_echo_with_logprobs(
    running: Server, logprobs_of: Callable[[list[int]], list[list[float]]], max_tokens: int
) -> None:
    tokens = tokens_of(running, prompt=PROMPT)
    done = ask(running, prompt=[tokens, tokens], echo=True, logprobs=2, max_tokens=max_tokens)
    assert done["usage"]["completion_tokens"] == 2 * max_tokens
    expected = logprobs_of(tokens)
    for choice in done["choices"]:
        found = choice["logprobs"]
        assert {len(values) for values in found.values()} == {len(tokens) + max_tokens}
        assert choice["text"].startswith(PROMPT)
        assert "".join(found["tokens"]) == choice["text"]
        assert [found["token_logprobs"][0], found["top_logprobs"][0]] == [None, None]
        assert [choice["text"][at:] for at in found["text_offset"]] == [
            "".join(found["tokens"][number:]) for number in range(len(found["tokens"]))
        ]
        for token, row, own, likeliest in zip(
            tokens[1:], expected, found["token_logprobs"][1:], found["top_logprobs"][1:], strict=False
        ):
            assert own == pytest.approx(row[token], abs=TOLERANCE)
            assert max(likeliest.values()) == pytest.approx(max(row), abs=TOLERANCE)


def test_a_stream_begins_with_the_prompt(running: Server) -> None:
    whole = ask(running, prompt=PROMPT, echo=True, logprobs=1, max_tokens=5)["choices"][0]
    client = running.openai
    chunks = client.completions.create(
        model=MODEL, prompt=PROMPT, echo=True, logprobs=1, max_tokens=5, temperature=0, stream=True
    )
    choices = [choice.model_dump() for chunk in chunks for choice in chunk.choices]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    for field, values in whole["logprobs"].items():
        assert [each for choice in choices for each in choice["logprobs"][field]] == values


def test_vllms_prompt_logprobs(running: Server, logprobs_of: Callable[[list[int]], list[list[float]]]) -> None:
    messages = [{"role": "user", "content": "Hello there"}]
    for path, prompt in (
        ("/v1/completions", {"prompt": PROMPT}),
        ("/v1/chat/completions", {"messages": messages}),
    ):
        tokens = tokens_of(running, **prompt)
        done = ask(running, path, **prompt, prompt_logprobs=3, max_tokens=1)
        found = done["prompt_logprobs"] if "messages" in prompt else done["choices"][0]["prompt_logprobs"]
        assert found[0] is None
        for token, row, entry in zip(tokens[1:], logprobs_of(tokens), found[1:], strict=True):
            assert 3 <= len(entry) <= 4
            for candidate, each in entry.items():
                assert each["logprob"] == pytest.approx(row[int(candidate)], abs=TOLERANCE)
            assert [each["rank"] for each in entry.values() if each["rank"] <= 3].count(1) == 1
            assert entry[str(token)]["decoded_token"] == ask_json(running, "/detokenize", {"tokens": [token]})["prompt"]
        assert "prompt_logprobs" not in str(ask(running, path, **prompt, max_tokens=1))
    with running.http as http:
        body = {"model": MODEL, "prompt": PROMPT, "prompt_logprobs": 1, "stream": True}
        refused = http.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt_logprobs")


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"echo": True, "logprobs": 1}, "echo"), ({"prompt_logprobs": 0}, "prompt_logprobs")],
)
def test_without_logits_of_all_tokens_the_key_is_named(last_only: Server, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"model\.calculate_logit_only_for_last_token=false") as refused:
        last_only.openai.completions.create(model=MODEL, prompt=PROMPT, extra_body=fields)
    assert refused.value.param == param
