from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.sampling.params import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 1.5),
        ("best_of", 0),
        ("best_of", 2),
        ("use_beam_search", 1),
        ("length_penalty", float("nan")),
        ("length_penalty", 2.0),
        ("early_stopping", "ever"),
        ("early_stopping", 1),
        ("early_stopping", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", {3: 101}),
        ("logit_bias", {-1: 0}),
        ("logit_bias", {"3": 1}),
        ("logit_bias", [3]),
        ("seed", -(2**63) - 1),
        ("seed", 2**64),
        ("seed", 1.0),
        ("seed", True),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
        ("stop", 1),
        ("stop_token_ids", ["a"]),
        ("stop_token_ids", 3),
        ("stop_token_ids", [True]),
        ("max_tokens", -1),
        ("max_tokens", 1.0),
        ("min_tokens", -1),
        ("min_tokens", 17),  # over the default of max_tokens
        ("logprobs", -2),
        ("prompt_logprobs", -2),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [1.0]),
        ("bad_words", [""]),
        ("bad_words", "word"),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("truncate_prompt_tokens", True),
        ("detokenize", 0),
        ("ignore_eos", None),
        ("structured_outputs", {}),
        ("structured_outputs", {"json": {}, "regex": "a"}),
        ("structured_outputs", {"structural_tag": "{}"}),
        ("structured_outputs", "json"),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.where == f"SamplingParams.{field}"
    assert caught.value.what.startswith(f"{field} does not take ")
    assert caught.value.valid


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.5),
        ("top_k", 5),
        ("top_p", 0.9),
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("presence_penalty", 1.0),
        ("frequency_penalty", 1.0),
        ("logit_bias", {3: 1.0}),
        ("seed", 1),
        ("allowed_token_ids", [3]),
        ("bad_words", ["x"]),
        ("stop", "end"),
        ("min_tokens", 1),
        ("logprobs", 0),
        ("max_tokens", 0),
        ("best_of", 3),  # fewer than n
    ],
)
def test_beam_search_takes_few_of_them(field: str, value: Any) -> None:
    others = {"use_beam_search": True, "n": 4}
    with pytest.raises(UserError) as caught:
        SamplingParams(**{**others, field: value})
    assert caught.value.where == f"SamplingParams.{field}"
    with_defaults = {"temperature": 0, "top_k": -1, "best_of": 4, "length_penalty": -1.0, "early_stopping": "never"}
    SamplingParams(**others, **with_defaults, skip_special_tokens=False, stop_token_ids=[1], prompt_logprobs=1)


def test_the_edges_are_taken() -> None:
    SamplingParams(
        temperature=0, top_k=-1, top_p=1, min_p=0, presence_penalty=-2, frequency_penalty=2, seed=0, logprobs=0
    )
    SamplingParams(top_p=1e-6, min_p=1, repetition_penalty=1e-3, seed=2**64 - 1, max_tokens=None, min_tokens=99)


def test_one_stop_string_or_several() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert hash(SamplingParams(stop=["a"], stop_token_ids=[1])) == hash(SamplingParams(stop="a", stop_token_ids=(1,)))


def test_none_for_a_list_is_an_empty_one() -> None:
    given = SamplingParams(stop=None, stop_token_ids=None, bad_words=None, logit_bias=None)  # type: ignore[arg-type]
    assert given == SamplingParams()


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"json": {"type": "null"}, "disable_any_whitespace": True}, "guided_json", '{"type": "null"}'),
        (SimpleNamespace(json=None, regex="a+", choice=None, _backend=None), "guided_regex", "a+"),
        ({"choice": ["a", "b"], "json_object": False}, "guided_choice", ("a", "b")),
        ({"grammar": 'start: "a"'}, "guided_grammar", 'start: "a"'),
        ({"json_object": True}, "guided_json", '{"type": "object"}'),
    ],
)
def test_structured_outputs_are_vllms_name_for_guided(given: Any, field: str, value: Any) -> None:
    params = SamplingParams(structured_outputs=given)
    assert params == SamplingParams(**{field: value})
    assert getattr(params, field) == value
    with pytest.raises(UserError, match="None, as guided_regex is given"):
        SamplingParams(structured_outputs=given, guided_regex="b")


def test_what_goes_without_a_text() -> None:
    with pytest.raises(UserError, match="without detokenize"):
        SamplingParams(stop="x", detokenize=False)
    with pytest.raises(UserError, match="unless special tokens are skipped"):
        SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=False)
    SamplingParams(spaces_between_special_tokens=False)


def test_greedy() -> None:
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=1e-6).greedy
    assert not SamplingParams(temperature=0.01).greedy
