"""OpenAI's routes, asked by OpenAI's own client and compared with the engine."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer

from furiosa_build.runtime import LLM, SamplingParams

from .conftest import TEMPLATE
from .process import Server

MODEL = "test"
PROMPT = "It was a"


@pytest.fixture(scope="module")
def expected(chat_artifact: Path) -> str:
    """Twelve greedy tokens after PROMPT."""
    [output] = LLM(chat_artifact).generate(PROMPT, SamplingParams(temperature=0, max_tokens=12))
    return output.outputs[0].text


def test_models(running: Server) -> None:
    assert [model.id for model in running.openai.models.list()] == [MODEL]


def test_a_completion_is_the_engines(running: Server, expected: str) -> None:
    done = running.openai.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0)
    assert done.choices[0].text == expected
    assert done.choices[0].finish_reason == "length"
    assert done.usage is not None
    assert (done.usage.completion_tokens, done.usage.total_tokens) == (12, 12 + done.usage.prompt_tokens)


def test_a_stream_has_the_same_text_and_usage(running: Server, expected: str) -> None:
    chunks = list(
        running.openai.completions.create(
            model=MODEL,
            prompt=PROMPT,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == expected
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_prompts_times_n(running: Server) -> None:
    done = running.openai.completions.create(
        model=MODEL, prompt=[PROMPT, "The sea"], n=2, max_tokens=12, temperature=1, seed=7
    )
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in done.choices]
    assert len(set(texts)) == 4  # each of the n has a seed of its own
    again = running.openai.completions.create(model=MODEL, prompt=PROMPT, n=2, max_tokens=12, temperature=1, seed=7)
    assert [choice.text for choice in again.choices] == texts[:2]


def test_stop_logit_bias_and_echo(running: Server, expected: str) -> None:
    word = expected.split()[1]
    done = running.openai.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, stop=word, extra_body={"echo": True}
    )
    assert done.choices[0].text == PROMPT + expected[: expected.index(word)]
    assert done.choices[0].finish_reason == "stop"
    biased = running.openai.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=3, temperature=0, logit_bias={"70": 100}, logprobs=0
    )
    with running.http as http:
        text = http.post("/detokenize", json={"tokens": [70, 70, 70]}).json()["prompt"]
    assert biased.choices[0].text == text


def test_logprobs(running: Server, expected: str) -> None:
    done = running.openai.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=2)
    logprobs = done.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == expected
    for chosen, likeliest in zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert chosen == max(likeliest.values())  # greedy
    chat = running.openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello"}],
        max_completion_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert [len(each.top_logprobs) for each in chat.choices[0].logprobs.content] == [3] * 4
    assert all(each.logprob == each.top_logprobs[0].logprob for each in chat.choices[0].logprobs.content)


def test_a_chat_goes_through_the_template(running: Server, chat_artifact: Path) -> None:
    client = running.openai
    done = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=12, temperature=0
    )
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
            max_tokens=12,
            temperature=0,
            stream=True,
        )
    )
    prompt = "user: Hello\nassistant:"
    [output] = LLM(chat_artifact).generate(prompt, SamplingParams(temperature=0, max_tokens=12))
    text = output.outputs[0].text
    assert done.choices[0].message.content == text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert [chunk.choices[0].delta.role for chunk in chunks].count("assistant") == 1
    with running.http as http:
        tokens = http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hello"}]}).json()["tokens"]
        assert http.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": prompt}
    assert done.usage is not None
    assert done.usage.prompt_tokens == len(tokens)


def test_tools_reach_the_template(running: Server) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    sizes = []
    for choice in ("auto", "none"):
        done = running.openai.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=1,
            tools=[tool],  # type: ignore[list-item]
            tool_choice=choice,  # type: ignore[arg-type]
        )
        assert done.usage is not None
        sizes.append(done.usage.prompt_tokens)
    assert sizes[0] > sizes[1]


def test_a_response_format_is_enforced(running: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"sea": {"type": "boolean"}, "kind": {"enum": ["calm", "wild"]}},
        "required": ["sea", "kind"],
        "additionalProperties": False,
    }
    done = running.openai.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=60,
        temperature=1,
        seed=3,
        response_format={"type": "json_schema", "json_schema": {"name": "sea", "schema": schema}},
    )
    value = json.loads(done.choices[0].message.content or "")
    assert type(value["sea"]) is bool
    assert value["kind"] in ("calm", "wild")
    with pytest.raises(openai.BadRequestError) as refused:
        running.openai.completions.create(
            model=MODEL,
            prompt="x",
            extra_body={"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        )
    assert refused.value.param == "response_format"


def test_errors_are_openais(running: Server) -> None:
    client = running.openai
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="other", prompt="x")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as too_hot:
        client.completions.create(model=MODEL, prompt="x", temperature=3)
    assert (too_hot.value.param, too_hot.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="token"):
        client.completions.create(model=MODEL, prompt="word " * 2000)
    with pytest.raises(openai.BadRequestError, match="is not a token id"):
        client.completions.create(model=MODEL, prompt=[10**6])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("response_format", {"type": "xml"}, "response_format"),
        ("top_logprobs", 3, "needs logprobs=true"),
        ("stream_options", {}, "streams only"),
        ("logit_bias", {"x": 1}, "not a token id"),
        ("logit_bias", {"70": 101}, "100"),
        ("messages", [], "at least 1"),
        ("n", "2", "valid integer"),
    ],
)
def test_what_has_no_effect_is_refused(running: Server, field: str, value: object, words: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1, field: value}
    with running.http as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"model": "test", "prompt": "\xff\xfe"}',
        b'{"model": "test", "prompt": "\\ud800"}',
        b'{"model": "test", "prompt": "x", "\\ud800": 1}',
        b'{"model": "test", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "test", "prompt": "x", "temperature": NaN}',
        b'{"model": "test", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
        json.dumps({"model": "test", "prompt": ["x"] * 1000}).encode(),
    ],
)
def test_a_malformed_body_is_a_400(running: Server, body: bytes) -> None:
    with running.http as http:
        answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_other_routes_errors_have_the_shape_too(running: Server) -> None:
    with running.http as http:
        for answer in (http.get("/v1/nothing"), http.put("/v1/completions"), http.post("/tokenize", json={})):
            assert answer.status_code in (400, 404, 405)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_tokens_and_words_that_may_come(running: Server, expected: str) -> None:
    def ask(**fields: object) -> str:
        done = running.openai.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, extra_body=fields
        )
        return done.choices[0].text

    word = expected.split()[1]
    assert word not in ask(bad_words=[word])
    with running.http as http:
        text = http.post("/detokenize", json={"tokens": [70] * 12}).json()["prompt"]
    assert ask(allowed_token_ids=[70]) == text
    for fields in ({"allowed_token_ids": []}, {"allowed_token_ids": [10**6]}, {"bad_words": [""]}):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(**fields)
        assert refused.value.param == next(iter(fields))


def test_what_there_is_to_know_of_the_tokenizer(running: Server, chat_artifact: Path) -> None:
    """By the names of vLLM's server: clients without a tokenizer of their own work with it."""
    theirs = AutoTokenizer.from_pretrained(chat_artifact / "model")
    with running.http as http:
        told = http.get("/tokenizer_info").json()
        answer = http.post("/tokenize", json={"prompt": "It was<|pad|>", "return_token_strs": True}).json()
    assert told["chat_template"] == TEMPLATE
    named = {name: told[name] for name in ("bos_token", "eos_token", "pad_token")}
    assert named == {name: getattr(theirs, name) for name in named}
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert answer["token_strs"] == theirs.convert_ids_to_tokens(answer["tokens"])
    assert answer["token_strs"][-1] == "<|pad|>"
