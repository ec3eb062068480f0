"""Structured output: with logits that are noise, only the guide can make a text valid.

What is valid is said by outside references: the jsonschema package, `re`, and lists of what a grammar allows.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.async_engine import AsyncLLMEngine
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.engine_args import AsyncEngineArgs
from furiosa_build.runtime.request import Request, RequestOutput, SamplingParams
from furiosa_build.runtime.sampling.guided import Guide, Guides, from_response_format
from furiosa_build.runtime.scheduling.scheduler import Scheduler
from furiosa_build.runtime.text.tokenizer import Tokenizer

from . import toy
from .stepping import drain

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
VOCAB = 2048  # of the quickstart model's tokenizer
END = 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(QUICKSTART)


@pytest.fixture(scope="module")
def guides(tokenizer: Tokenizer) -> Guides:
    return Guides(tokenizer, [END], VOCAB)


def make(guides: Guides, **guided: Any) -> Guide:
    guide = guides.make(SamplingParams(**guided))
    assert guide is not None
    return guide


def wander(guide: Guide, seed: int, most: int = 3000, closers: Collection[int] = ()) -> list[int]:
    """Tokens drawn from the allowed ones alike, but the end, and then the closers, every other time they may be."""
    source, tokens = random.Random(seed), list[int]()
    while not guide.is_complete:
        assert guide.error is None
        allowed = np.flatnonzero(guide.allowed).tolist()
        if END in allowed and (allowed == [END] or source.random() < 0.5):
            break
        closing = [token for token in allowed if token in closers]
        choices = closing if closing and source.random() < 0.5 else [token for token in allowed if token != END]
        tokens.append(source.choice(choices))
        guide.advance(tokens[-1])
        assert len(tokens) < most, "does not end"
    return tokens


# What may be said


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
        st.builds(lambda values: {"enum": values}, st.lists(SCALARS, min_size=1, max_size=4)),
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


# What is refused


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
        ({"guided_json": {"multipleOf": 0.1}}, "multipleOf is no integer"),
        ({"guided_json": {"maximum": 2**63 - 1}}, "9223372036854775807"),
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


def test_an_engine_for_asyncio_prepares(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> str:
        async with AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model=str(artifact))) as engine:
            monkeypatch.setattr("llguidance.LLTokenizer", None)
            states = engine.generate("x", SamplingParams(guided_choice=["yes", "no"]), "1")
            return [state.outputs[0].text async for state in states][-1]

    assert asyncio.run(ask()) in ("yes", "no")


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


# In the engine


@pytest.fixture
def artifact(toy_backend: toy.ToyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy model with the quickstart model's tokenizer: its logits are noise."""
    del toy_backend
    monkeypatch.setattr(toy, "VOCAB", VOCAB)
    data = toy.artifact_data({"prefill": [(1, 8), (4, 8), (1, 128)], "decode": [(1, 128), (4, 128)]}, num_blocks=200)
    files = {
        "tokenizer.json": (QUICKSTART / "tokenizer.json").read_text(),
        "generation_config.json": {"eos_token_id": END},
    }
    return toy.write_artifact(tmp_path / "artifact", data, tokenizer=False, model_files=files)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "kind": {"enum": ["é", "☃☃", None, 1.5]},
        "scores": {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 500}, "maxItems": 3},
        "inner": {"type": "object", "properties": {"x": {"type": "boolean"}}, "additionalProperties": False},
    },
    "required": ["name", "kind", "scores"],
    "additionalProperties": False,
}
SAMPLED = {
    "temperature": 1.3,
    "top_p": 0.9,
    "top_k": 50,
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.5,
    "seed": 3,
}
# In this order they arrive, so the guided ones give way to others.
MIXED: dict[str, dict[str, Any]] = {
    "none": {"temperature": 0, "ignore_eos": True, "max_tokens": 40},
    "none sampled": {"ignore_eos": True, "max_tokens": 40, **SAMPLED},
    "json": {"guided_json": PERSON, "temperature": 0},
    "sampled json": {"guided_json": json.dumps(PERSON), **SAMPLED},
    "regex": {"guided_regex": r"[A-C]{9}-\d{4}", **SAMPLED},
    "choice": {"guided_choice": ["a", "ab", "abacus"], "temperature": 0},
    "grammar": {"guided_grammar": 'start: "(" ("x" | "yy" | "☃"){7} ")"', **SAMPLED},
}


def serve(artifact: Path, **arguments: Any) -> dict[str, RequestOutput]:
    """All of MIXED at once."""
    engine = LLMEngine(artifact, seed=1, **arguments)
    for name in MIXED:
        add(engine, name)
    return drain(engine)


def add(engine: LLMEngine, name: str) -> None:
    engine.add_request(name, prompt(name), SamplingParams(**{"max_tokens": 100, **MIXED[name]}))


def prompt(name: str) -> list[int]:
    return [list(MIXED).index(name) + 5] * 6


def check(outputs: dict[str, RequestOutput]) -> None:
    texts = {name: output.outputs[0].text for name, output in outputs.items()}
    for name in ("json", "sampled json"):
        jsonschema.validate(json.loads(texts[name]), PERSON)
    assert re.fullmatch(r"[A-C]{9}-\d{4}", texts["regex"])
    assert texts["choice"] in ("a", "ab", "abacus")
    assert re.fullmatch(r"\((x|yy|☃){7}\)", texts["grammar"])
    assert {output.outputs[0].finish_reason for name, output in outputs.items() if "none" not in name} == {"stop"}


def test_guided_requests_are_valid_and_disturb_no_others(artifact: Path) -> None:
    together = serve(artifact)
    check(together)
    assert together["none"].outputs[0].token_ids == toy.expected(prompt("none"), 40)
    for name in MIXED:
        engine = LLMEngine(artifact, seed=1)
        add(engine, name)
        assert drain(engine)[name] == together[name]


def test_preemption_changes_nothing(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preempted: list[str] = []
    preempt = Scheduler.preempt

    def spy(self: Scheduler, request: Request) -> None:
        if request.num_generated > 1:
            preempted.append(request.request_id)
        preempt(self, request)

    expected = serve(artifact)
    monkeypatch.setattr(Scheduler, "preempt", spy)
    assert serve(artifact, paged_attention_num_blocks=33) == expected
    assert any("none" not in name for name in preempted)


def test_neither_preemption_nor_hits_change_anything(
    toy_backend: toy.ToyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided or not, greedy, sampled and beams: whenever they give way, and with prompts that begin alike."""
    del toy_backend
    monkeypatch.setattr(toy, "VOCAB", VOCAB)
    buckets: dict[str, list[tuple[int, ...]]] = {
        "prefill": [(1, 8), (2, 16)],
        "append": [(2, 4, 128)],
        "decode": [(2, 128), (6, 128)],
    }
    data = toy.artifact_data(buckets, num_blocks=300, beams=(2, 8))
    files = {
        "tokenizer.json": (QUICKSTART / "tokenizer.json").read_text(),
        "generation_config.json": {"eos_token_id": END},
    }
    artifact = toy.write_artifact(tmp_path / "artifact", data, tokenizer=False, model_files=files)
    requests = {
        **{name: ([7] * 13 + prompt(name), {"max_tokens": 30, **MIXED[name]}) for name in MIXED},
        **{f"beams {n}": ([7] * n, {"use_beam_search": True, "max_tokens": 8, "ignore_eos": True}) for n in (5, 14)},
    }

    def outputs(chance: random.Random | None, *, caches: bool, num_blocks: int) -> dict[str, RequestOutput]:
        engine = LLMEngine(artifact, seed=1, enable_prefix_caching=caches, paged_attention_num_blocks=num_blocks)
        [replica] = engine._replicas
        for name, (tokens, params) in requests.items():
            engine.add_request(name, tokens, SamplingParams(**params))
        found: dict[str, RequestOutput] = {}
        while engine.has_unfinished_requests():
            found |= {output.request_id: output for output in engine.step()}
            running = replica.scheduler.running
            if chance is not None and running and chance.random() < 0.03:
                replica.scheduler.preempt(chance.choice(running))
            engine.check_integrity()
        preemptions.append(engine.stats().preemptions)
        hits.append(engine.stats().cached_tokens)
        return found

    preemptions, hits = list[int](), list[int]()
    expected = outputs(None, caches=False, num_blocks=300)
    assert (preemptions, hits) == ([0], [0])
    for seed in range(3):
        for caches in (False, True):
            assert outputs(random.Random(seed), caches=caches, num_blocks=40) == expected
    assert min(preemptions[1:]) > 1
    assert min(hits[2::2]) > 0


def test_a_text_ends_where_its_grammar_does(artifact: Path, tokenizer: Tokenizer) -> None:
    engine = LLMEngine(artifact, seed=1)
    for number in range(30):  # without top_k and the like, so that the end, too, comes up
        engine.add_request(str(number), [5], SamplingParams(guided_choice=["a", "ab"], seed=number))
    ends = {(out.text, *out.token_ids[-1:]) for o in drain(engine).values() for out in o.outputs}
    [a], [b], [ab] = (tokenizer.encode(text) for text in ("a", "b", "ab"))
    assert {out for out in ends if out[0] == "a"} == {("a", END)}  # the model's own end
    assert {out for out in ends if out[0] == "ab"} <= {("ab", b), ("ab", ab)}  # no step for an end that must come
    assert len(ends) > 1
    assert a not in {out[1] for out in ends}


def test_only_max_tokens_cuts_a_text(artifact: Path) -> None:
    engine = LLMEngine(artifact, seed=1)
    engine.add_request("cut", [5], SamplingParams(guided_regex="a{200}", max_tokens=3))
    engine.add_request("whole", [5], SamplingParams(guided_regex="[ab]", max_tokens=1))
    outputs = drain(engine)
    assert outputs["cut"].outputs[0].finish_reason == "length"
    assert outputs["cut"].outputs[0].stop_reason is None
    assert re.fullmatch("a+", outputs["cut"].outputs[0].text)
    assert outputs["whole"].outputs[0].finish_reason == "stop"


def test_a_dead_end_of_a_grammar_ends_its_request_alone(artifact: Path) -> None:
    engine = LLMEngine(artifact, seed=1)
    engine.add_request("dead", [5], SamplingParams(guided_grammar='start: "ab" dead\ndead: /[^\\s\\S]/', max_tokens=50))
    engine.add_request("other", [5] * 3, SamplingParams(temperature=0, ignore_eos=True, max_tokens=9))
    outputs = drain(engine)
    [dead] = outputs["dead"].outputs
    assert (dead.text, dead.finish_reason, dead.stop_reason) == ("ab", "length", "no text can follow what there is")
    assert outputs["other"].outputs[0].token_ids == toy.expected([5] * 3, 9)


def test_log_probabilities_are_the_models_own(artifact: Path) -> None:
    engine = LLMEngine(artifact, seed=1)
    engine.add_request("r", [5, 6], SamplingParams(guided_regex=r"\d{4}", temperature=0, logprobs=1))
    [output] = drain(engine)["r"].outputs
    tokens = [5, 6]
    assert output.logprobs is not None
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        logits = toy.logits_after(tokens)
        assert entry[token].logprob == pytest.approx(float(logits.log_softmax(0)[token]), abs=1e-5)  # float32
        assert {id_ for id_ in entry if entry[id_].rank == 1} == {int(logits.argmax())}  # though it is not allowed
        tokens.append(token)


def test_a_refused_request_leaves_the_engine_as_it_was(artifact: Path) -> None:
    engine = LLMEngine(artifact, seed=1)
    with pytest.raises(UserError, match="Unimplemented"):
        engine.add_request("r", [5], SamplingParams(guided_json={"not": {}}))
    assert not engine.has_unfinished_requests()
    engine.check_integrity()
