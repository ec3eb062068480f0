"""Structured output: with logits that are noise, only the guide can make a text valid.

What is valid is said by outside references: the jsonschema package, `re`, and lists of what a grammar allows.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from furiosa_build.runtime.sampling.guided import Guides
from furiosa_build.runtime.text.tokenizer import Tokenizer

from .guides import END, VOCAB, make, wander

NAMES = st.text(st.sampled_from('ab"\\/ é☃\n'), min_size=1, max_size=4)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-99, 99),
    st.integers(-999, 999).map(lambda n: n / 8),
    st.text('aé\n"\\😀', max_size=4),
)


STRINGS = st.one_of(
    st.sampled_from(
        [
            {"type": "string", "pattern": "^[a-f]{2,3}$"},
            {"type": "string", "pattern": r"^\d{3}-\w+$", "maxLength": 8},
            {"type": "string", "pattern": "^(☃|é{2})$"},
            {"type": "string", "format": "ipv4"},
            {"type": "string", "format": "uuid"},
        ]
    ),
    st.sampled_from([{"type": "string"}, {"type": "string", "pattern": "b|é"}, {"pattern": "a", "maxLength": 5}]),
    st.builds(
        lambda n, more: {"type": "string", "minLength": n, "maxLength": n + more}, st.integers(0, 3), st.integers(0, 3)
    ),
)


@st.composite
def numbers(draw: st.DrawFn) -> dict[str, Any]:
    least, most = draw(st.sampled_from([("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")]))
    low = draw(st.integers(-2000, 2000))
    schema: dict[str, Any] = {"type": draw(st.sampled_from(["integer", "number"]))}
    if draw(st.booleans()):
        schema |= {least: low, most: low + draw(st.integers(2, 3000))}
    if draw(st.booleans()) and schema.get(most, low + 100) - low > 20:
        schema["multipleOf"] = draw(st.integers(1, 9))
    return schema


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, inner, max_size=3))
    required = [name for name in properties if draw(st.booleans())]
    schema: dict[str, Any] = {"type": "object", "properties": properties, "required": required}
    if draw(st.booleans()):
        schema["additionalProperties"] = draw(st.one_of(st.booleans(), inner))
    if draw(st.booleans()):
        schema["patternProperties"] = {"^[xy]{2}$": {"type": "boolean"}}
        if len(required) == len(properties):
            schema |= {"minProperties": len(required), "maxProperties": len(properties) + 2}
    return schema


@st.composite
def arrays(draw: st.DrawFn, inner: st.SearchStrategy[dict[str, Any]]) -> dict[str, Any]:
    least = draw(st.integers(0, 2))
    schema = {"type": "array", "items": draw(inner), "minItems": least, "maxItems": least + draw(st.integers(0, 2))}
    if draw(st.booleans()):
        schema["prefixItems"] = [draw(inner)]
    return schema


SCHEMAS = st.recursive(
    st.one_of(
        STRINGS,
        numbers(),
        st.just({"type": ["boolean", "null"]}),
        st.builds(
            lambda values: {"enum": values},
            st.lists(SCALARS, min_size=1, max_size=4, unique_by=lambda value: (type(value) is bool, value)),
        ),
        st.builds(lambda value: {"const": value}, SCALARS),
        st.just({"$ref": "#/$defs/x"}),
    ),
    lambda inner: st.one_of(
        objects(inner),
        arrays(inner),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda part: {"oneOf": [part, {"const": "only here"}]}, objects(inner)),
        st.builds(lambda part: {"title": "t", "description": "d", "allOf": [part]}, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(schema=st.builds(lambda schema, x: schema | {"$defs": {"x": x}}, SCHEMAS, STRINGS), seed=st.integers(0, 2**32))
def test_every_text_of_a_schema_validates(
    guides: Guides, tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    closers = {token for mark in ('"', "}", "]") for token in tokenizer.encode(mark)}
    text = tokenizer.decode(wander(make(guides, guided_json=schema), seed, closers=closers))
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker(["ipv4", "uuid"]))
    validator.validate(json.loads(text))


@pytest.mark.parametrize(
    ("pattern", "excluded"),
    [
        ('^[^"]{1,3}$', '"'),
        (r"^[^\\]{1,3}$", "\\"),
        (r"^[\x00-\x1f]{2}$", '"\\'),
        (r"^[^!-~]{2}$", '"\\'),
        (r"^\p{Cc}$", '"\\'),
        (r"^[[:cntrl:]]$", '"\\'),
        (r'^[\W--"]{2}$', '"'),
    ],
)
@pytest.mark.parametrize("where", ["pattern", "key"])
def test_a_class_excludes_what_has_to_be_escaped(
    guides: Guides, tokenizer: Tokenizer, pattern: str, excluded: str, where: str
) -> None:
    """That a text of noise would have a quote is too unlikely, so this looks at what may follow a backslash."""
    keys = {"type": "object", "patternProperties": {pattern: {"type": "null"}}, "additionalProperties": False}
    guide = make(guides, guided_json={"type": "string", "pattern": pattern} if where == "pattern" else keys)
    for token in tokenizer.encode('"\\' if where == "pattern" else '{"\\'):
        guide.advance(token)
    following = {tokenizer.decode([int(token)])[0] for token in np.flatnonzero(guide.allowed)}
    assert "n" in following
    assert not following & set(excluded)


def test_a_key_has_one_spelling_only(guides: Guides, tokenizer: Tokenizer) -> None:
    guide = make(guides, guided_json={"type": "object", "properties": {"a/": {"type": "integer"}}})
    for token in tokenizer.encode('{"\\'):
        guide.advance(token)
    following = {tokenizer.decode([int(token)])[0] for token in np.flatnonzero(guide.allowed)}
    assert following <= set('nrbtf\\"')  # neither \\u0061 nor \\/


REGEXES = [r"\d{3}-\d{4}", r"^(yes|no|é☃?)$", r"a/b\.[x-z]+", r"[A-C]{2,5}( [A-C]{2,5}){0,2}", r"(😀|😁){1,3}"]


@pytest.mark.parametrize("regex", REGEXES)
@pytest.mark.parametrize("seed", range(5))
def test_every_text_of_a_regex_matches(guides: Guides, tokenizer: Tokenizer, regex: str, seed: int) -> None:
    assert re.fullmatch(regex, tokenizer.decode(wander(make(guides, guided_regex=regex), seed)))


def test_choices_are_all_that_can_be_said_and_all_can_be(guides: Guides, tokenizer: Tokenizer) -> None:
    choices = ["a", "ab", "abacus", 'say "a"\\b\n', "é☃"]
    guide = {"guided_choice": choices}
    assert {tokenizer.decode(wander(make(guides, **guide), seed)) for seed in range(100)} == set(choices)


GRAMMAR = """
start: sum
sum: term ("+" term)*
term: DIGIT | "(" sum ")"
DIGIT: /[1-3]/
"""


@pytest.mark.parametrize("seed", range(10))
def test_every_text_of_a_grammar_follows_it(guides: Guides, tokenizer: Tokenizer, seed: int) -> None:
    text = tokenizer.decode(wander(make(guides, guided_grammar=GRAMMAR), seed))
    assert re.fullmatch(r"[1-3+()]+", text)
    assert eval(text) >= 1  # parentheses that do not match are a SyntaxError


def test_the_end_is_allowed_exactly_when_the_text_may_end(guides: Guides, tokenizer: Tokenizer) -> None:
    guide = make(guides, guided_choice=["a", "ab"])
    [a], [b] = tokenizer.encode("a"), tokenizer.encode("b")
    assert not guide.allowed[END]
    guide.advance(a)
    assert np.flatnonzero(guide.allowed).tolist() == [END, b]
    assert not guide.is_complete
    guide.advance(b)
    assert guide.is_complete


@pytest.mark.parametrize("vocab", [2100, 1900])
def test_there_may_be_more_or_fewer_logits_than_tokens(tokenizer: Tokenizer, vocab: int) -> None:
    guide = make(Guides(tokenizer, [END], vocab), guided_regex=".*")
    assert guide.allowed.shape == (vocab,)
    assert guide.allowed[:1900].sum() > 1000
    assert not guide.allowed[VOCAB:].any()


@pytest.mark.parametrize("guided", [{"guided_regex": r"\d[\d]"}, {"guided_grammar": 'start: /\\d[\\d]/ "" // \\d'}])
def test_digits_are_0_to_9(guides: Guides, tokenizer: Tokenizer, guided: dict[str, str]) -> None:
    texts = {tokenizer.decode(wander(make(guides, **guided), seed)) for seed in range(20)}
    assert all(re.fullmatch("[0-9]{2}", text) for text in texts)


def test_what_is_no_digit_may_be_one_of_another_script(guides: Guides, tokenizer: Tokenizer) -> None:
    for pattern in (r"\D", r"[^\d]", r"[\D]"):
        guide = make(guides, guided_regex=pattern)
        assert {id_ for id_ in range(VOCAB) if guide.allowed[id_]} & set(tokenizer.encode("5")) == set()
        [first, *_] = tokenizer.encode("\u0663")
        assert guide.allowed[first]
    assert make(guides, guided_regex=r"\\d").allowed[tokenizer.encode("\\")[0]], "a backslash, and the letter"
