"""What clients send, beyond the fields that their users think of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from furiosa_build.server.http.json_route import IGNORED_FIELDS
from furiosa_build.server.openai.protocol import ChatRequest, CompletionRequest

from .asking import CHAT, HELLO, PATHS, TEXT, choices, post, said, text
from .process import Server, server

# Null


OF_OPENAI = {
    "/v1/chat/completions": "audio function_call functions metadata modalities moderation prediction prompt_cache_key "
    "reasoning_effort safety_identifier service_tier store user verbosity web_search_options",
    "/v1/completions": "best_of logit_bias suffix user",
}


@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/chat/completions", ChatRequest), ("/v1/completions", CompletionRequest)]
)
def test_null_is_not_given(running: Server, path: str, kind: type[ChatRequest | CompletionRequest]) -> None:
    body = PATHS[path]
    expected = post(running, path, body)
    nulls = {name: None for name in (*kind.model_fields, *OF_OPENAI[path].split()) if name not in body}
    answer = post(running, path, nulls | body)
    assert choices(answer) == choices(expected)
    assert answer.json().keys() == expected.json().keys()
    assert IGNORED_FIELDS not in answer.headers


def test_null_is_the_default_and_not_no_limit(running: Server) -> None:
    done = post(running, "/v1/completions", TEXT | {"max_tokens": None, "ignore_eos": True})
    assert done.json()["usage"]["completion_tokens"] == 16


def test_nulls_within_parts(running: Server) -> None:
    message = {"role": "user", "content": "Hello", "name": None, "tool_calls": None, "tool_call_id": None}
    tool = {"type": "function", "function": {"name": "f", "description": None, "parameters": None, "strict": None}}
    plain = {"type": "function", "function": {"name": "f"}}
    assert said(running, messages=[message], tools=[tool]) == said(running, tools=[plain])


# Fields that are not known, or of no use here


def test_what_changes_no_text_is_taken(running: Server) -> None:
    more = {
        "metadata": {"a": "b"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "prompt_cache_key": "x",
        "safety_identifier": "x",
        "service_tier": "auto",
        "store": False,
        "user": "",
    }
    answer = post(running, "/v1/chat/completions", CHAT | more)
    assert choices(answer) == choices(post(running, "/v1/chat/completions", CHAT))
    assert IGNORED_FIELDS not in answer.headers


@pytest.mark.parametrize("path", PATHS)
def test_fields_that_are_not_known_are_told(running: Server, path: str) -> None:
    more = {"nonsense": 1, "unsinn \u00e9\n": [2], "stream_options": {"include_usage": True, "pace": 3}, "stream": True}
    answer = post(running, path, PATHS[path] | more, headers={"X-Request-Id": "curious"})
    assert answer.status_code == 200
    assert answer.headers[IGNORED_FIELDS] == "nonsense, unsinn%20%C3%A9%0A, stream_options.pace"
    told = running.wait_for("fields that are not known are ignored", request_id="curious")
    assert told["level"] == "warning"
    assert told["fields"] == ["nonsense", "unsinn \u00e9\n", "stream_options.pace"]
    assert IGNORED_FIELDS not in post(running, path, PATHS[path]).headers


def test_a_thousand_of_them_are_not_all_told(running: Server) -> None:
    header = post(running, "/v1/completions", TEXT | {f"x{number}": 1 for number in range(1000)}).headers[
        IGNORED_FIELDS
    ]
    assert header.endswith(", x15, ...")
    assert post(running, "/v1/completions", TEXT | {"x": 1, "": 2}).headers[IGNORED_FIELDS] == 'x, ""'


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/chat/completions", "functions", [{"name": "f"}]),
        ("/v1/chat/completions", "function_call", "auto"),
        ("/v1/chat/completions", "modalities", ["text", "audio"]),
        ("/v1/chat/completions", "verbosity", "low"),
        ("/v1/chat/completions", "web_search_options", {}),
        ("/v1/chat/completions", "chat_template", "{{ messages }}"),
        ("/v1/completions", "suffix", "the end"),
        ("/v1/completions", "cache_salt", "x"),
    ],
)
def test_what_would_change_the_text_is_refused_by_name(running: Server, path: str, field: str, value: object) -> None:
    answer = post(running, path, PATHS[path] | {field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, field, "unsupported")
    assert error["message"].startswith(f"{field} is not supported: ")


@pytest.fixture(scope="module")
def strict(chat_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that refuses what it does not know, and whose requests are nearly greedy by default."""
    directory = tmp_path_factory.mktemp("defaults")
    defaults = {
        "do_sample": True,
        "temperature": 0.8,
        "top_k": 1,
        "top_p": None,
        "max_new_tokens": 7,
        "eos_token_id": 3,
    }
    (directory / "generation_config.json").write_text(json.dumps(defaults))
    with server(chat_artifact, "--strict-requests", "true", "--generation-config", str(directory)) as started:
        started.wait_for("ready")
        yield started


def test_strict_requests_are_refused_by_the_first_such_field(strict: Server) -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "x", "mood": 1}]}
    answer = post(strict, "/v1/chat/completions", CHAT | {"messages": [message], "nonsense": 2})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, "nonsense", "unknown_field")
    answer = post(strict, "/v1/chat/completions", CHAT | {"messages": [message]})
    assert answer.json()["error"]["param"] == "messages.0.content.0.mood"
    assert choices(post(strict, "/v1/chat/completions", CHAT | {"user": "x", "nonsense": None}))


def test_sampling_defaults_are_the_models(strict: Server) -> None:
    without = {name: value for name, value in TEXT.items() if name != "temperature"}
    texts = {choices(post(strict, "/v1/completions", without | {"seed": seed}))[0]["text"] for seed in range(3)}
    assert texts == {text(strict)}
    hot = {
        choices(post(strict, "/v1/completions", without | {"top_k": 0, "seed": seed}))[0]["text"] for seed in range(3)
    }
    assert len(hot) == 3
    endless = {"messages": HELLO, "model": "test", "ignore_eos": True}
    assert post(strict, "/v1/chat/completions", endless).json()["usage"]["completion_tokens"] == 7
    assert post(strict, "/v1/chat/completions", endless | {"max_tokens": 9}).json()["usage"]["completion_tokens"] == 9


# Sampling


def test_any_64_bits_are_a_seed(running: Server) -> None:
    texts = {}
    for seed in (-1, -2, -(2**63), 2**63 - 1, 0):
        texts[seed] = text(running, temperature=1, seed=seed, max_tokens=12)
        assert text(running, temperature=1, seed=seed, max_tokens=12) == texts[seed]
    assert texts[-1] != texts[-2]
    for seed in (2**63, -(2**63) - 1):
        assert post(running, "/v1/completions", TEXT | {"seed": seed}).json()["error"]["param"] == "seed"


def test_edges_of_values(running: Server) -> None:
    assert text(running, temperature=1, top_p=0, seed=1) == text(running)
    assert text(running, max_tokens=3.0, n=1.0) == text(running, max_tokens=3)
    assert text(running, stop=[]) == text(running)
    for field, value in (("stop", ""), ("stop", [""]), ("logit_bias", {"-1": 1}), ("temperature", "0.5"), ("n", 1.5)):
        answer = post(running, "/v1/completions", TEXT | {field: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


def test_the_stop_string_is_part_of_the_text_if_so_asked(running: Server) -> None:
    whole = text(running)
    word = whole.split()[1]
    expected = whole[: whole.index(word) + len(word)]
    assert text(running, stop=word, include_stop_str_in_output=True) == expected
    body = TEXT | {"stop": word, "include_stop_str_in_output": True, "stream": True}
    events = [line.removeprefix("data: ") for line in post(running, "/v1/completions", body).text.split("\n\n")]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-2]) == expected


def test_the_best_of_several(running: Server) -> None:
    drawn = choices(post(running, "/v1/completions", TEXT | {"temperature": 1, "seed": 5, "n": 4, "logprobs": 0}))
    by_mean = sorted(drawn, key=lambda each: sum(each["logprobs"]["token_logprobs"]) / len(each["logprobs"]["tokens"]))
    best = choices(post(running, "/v1/completions", TEXT | {"temperature": 1, "seed": 5, "n": 2, "best_of": 4}))
    assert [each["text"] for each in best] == [each["text"] for each in by_mean[:1:-1]]
    assert [(each["index"], each["logprobs"]) for each in best] == [(0, None), (1, None)]
    for fields, param in (({"n": 2, "best_of": 1}, "best_of"), ({"best_of": 2, "stream": True}, "stream")):
        assert post(running, "/v1/completions", TEXT | fields).json()["error"]["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "[0-9]{3}"},
        {"structured_outputs": {"regex": "[0-9]{3}"}},
        {"structured_outputs": {"choice": ["123", "456"]}},
        {"guided_choice": ["123", "456"], "guided_decoding_backend": "auto"},
        {"structured_outputs": {"json": {"type": "integer", "minimum": 100, "maximum": 999}}},
        {"guided_json": json.dumps({"type": "integer", "minimum": 100, "maximum": 999})},
        {"guided_grammar": 'start: "1" "2" "3"'},
    ],
)
def test_what_the_text_is_to_look_like(running: Server, fields: dict[str, Any]) -> None:
    for found in (text(running, **fields), said(running, **fields)):
        assert found.isdecimal()
        assert len(found) == 3


# Errors


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"max_completion_tokens": 2, "min_tokens": 3}, "min_tokens"),
        ("/v1/chat/completions", {"structured_outputs": {"json": {"type": "x"}}}, "structured_outputs.json"),
        ("/v1/chat/completions", {"guided_regex": "("}, "guided_regex"),
        ("/v1/completions", {"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ("/v1/completions", {"stop_token_ids": [10**6]}, "stop_token_ids"),
        ("/v1/completions", {"use_beam_search": True}, "use_beam_search"),
        ("/v1/completions", {"use_beam_search": True, "stream": True}, "stream"),
        ("/v1/completions", {"stop": 5}, "stop"),
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt.1"),
        ("/v1/completions", {"prompt": []}, "prompt"),
        ("/v1/completions", {"prompt": [[]]}, "prompt"),
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": ["a", ""]}, "prompt"),
        ("/v1/completions", {"prompt": None}, "prompt"),
        ("/v1/chat/completions", {"messages": None}, "messages"),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "messages.0.role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0"),
        (
            "/v1/chat/completions",
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
    ],
)
def test_errors_name_the_field_as_it_was_sent(running: Server, path: str, fields: dict[str, Any], param: str) -> None:
    answer = post(running, path, PATHS[path] | fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    for engines in ("SamplingParams", "guided_json", "constrained", "list[", "dictionary"):
        assert engines not in error["message"]


# Usage


def test_every_chunk_has_the_usage_so_far(running: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    answer = post(running, "/v1/completions", TEXT | {"stream": True, "stream_options": options})
    chunks = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n")[:-2]]
    numbers = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert numbers == sorted(numbers)
    assert numbers[0] >= 1
    assert numbers[-2:] == [6, 6]
    assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1
