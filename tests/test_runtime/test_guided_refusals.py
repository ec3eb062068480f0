"""Structured output that cannot be served, and OpenAI's way of asking for it."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.sampling.guided import Guides, from_response_format
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.text.tokenizer import Tokenizer

from .guides import END, VOCAB, make


@pytest.mark.parametrize(
    ("guided", "words"),
    [
        ({"guided_json": {"not": {}}}, 'Unimplemented keys: ["not"]'),
        ({"guided_json": {"properties": {"a": {"uniqueItems": True}}}}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"guided_json": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable schema: minimum (5)"),
        ({"guided_json": {"type": "object", "minProperties": 2}}, "minProperties is 2, of which 0 are required"),
        ({"guided_json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf"),
        ({"guided_json": {"$ref": "http://localhost/x"}}, "http://localhost/x"),
        ({"guided_json": {"x-guidance": {"lenient": True}, "not": {}}}, "x-guidance"),
        ({"guided_json": {"const": 5.960464477539063e-08}}, "5.960464477539063e-08"),
        ({"guided_json": {"multipleOf": 0.1}}, "multipleOf is not an integer"),
        ({"guided_json": {"maximum": 2**63 - 1}}, "9223372036854775807"),
        ({"guided_json": {"enum": [-41, -41.0]}}, "guided_json cannot be served: llguidance cannot handle it"),
        ({"guided_json": {"title": "\ud800"}}, "end of hex escape"),
        ({"guided_json": {"title": "x" * 40000}}, "40013 bytes"),
        ({"guided_regex": "(?=a)b"}, "look-around"),
        ({"guided_regex": "[a"}, "unclosed character class"),
        ({"guided_regex": r"[^\s\S]"}, "no text can follow"),
        ({"guided_grammar": "start: other"}, 'unknown name: "other"'),
        ({"guided_grammar": "start: start"}, "no text can follow"),
        ({"guided_grammar": "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(100_000))}, "bytes"),
    ],
)
def test_what_cannot_be_served_is_refused_before_generation(guides: Guides, guided: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        guides.make(SamplingParams(**guided))
    assert words in str(error.value)
    assert error.value.where == f"SamplingParams.{next(iter(guided))}"
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_choice": "ab"}, "guided_choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", ""]}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": True}, "guided_json"),
        ({"guided_json": {"const": object()}}, "guided_json"),
        ({"guided_json": {"const": float("nan")}}, "guided_json"),
        ({"guided_json": "[" * 100_000}, "guided_json"),
        ({"guided_regex": "a", "stop": "a"}, "stop"),
        ({"guided_regex": "a", "stop_token_ids": [1]}, "stop_token_ids"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "a", "min_tokens": 1}, "min_tokens"),
        ({"guided_regex": "a", "use_beam_search": True}, "use_beam_search"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(params: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError) as error:
        SamplingParams(**params)
    assert error.value.where == f"SamplingParams.{field}"


def test_the_schema_is_kept_as_it_was() -> None:
    schema: dict[str, Any] = {"enum": [1]}
    params = SamplingParams(guided_json=schema)
    schema["enum"].append(2)
    assert params == SamplingParams(guided_json='{"enum": [1]}')
    assert hash(params) == hash(SamplingParams(guided_json='{"enum": [1]}'))


def test_without_llguidance_the_extra_is_named(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    guides = Guides(tokenizer, [END], VOCAB)
    assert guides.make(SamplingParams()) is None
    with pytest.raises(UserError, match=r"furiosa-build\[guided\]"):
        guides.make(SamplingParams(guided_regex="a"))


def test_what_takes_long_can_be_done_beforehand(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    guides = Guides(tokenizer, [END], VOCAB)
    guides.prepare()
    monkeypatch.setattr("llguidance.LLTokenizer", None)  # so that none can be made
    assert make(guides, guided_regex="a")
    for impossible in (Guides(None, [END], VOCAB), Guides(tokenizer, [], VOCAB)):
        impossible.prepare()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    Guides(tokenizer, [END], VOCAB).prepare()


def test_it_needs_a_tokenizer_and_an_end(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        Guides(None, [END], VOCAB).make(SamplingParams(guided_regex="a"))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Guides(tokenizer, [], VOCAB).make(SamplingParams(guided_regex="a"))


# OpenAI's response_format


def test_a_response_format_becomes_parameters() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    described = {"name": "x", "schema": schema, "strict": True}
    assert from_response_format({"type": "text"}) == {}
    assert from_response_format({"type": "json_object"}) == {"guided_json": {"type": "object"}}
    assert from_response_format({"type": "json_schema", "json_schema": described}) == {"guided_json": schema}


@pytest.mark.parametrize(
    ("response_format", "where"),
    [
        ({}, "type"),
        ({"type": "xml"}, "type"),
        ("text", "type"),
        ({"type": "json_schema"}, "json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": "{}"}}, "json_schema.schema"),
    ],
)
def test_another_response_format_is_refused(response_format: Any, where: str) -> None:
    with pytest.raises(UserError) as error:
        from_response_format(response_format)
    assert error.value.where == f"response_format.{where}"
