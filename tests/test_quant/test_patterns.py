"""Patterns of checkpoints against Python's own `re.match`, which is what compressed-tensors calls."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_build.quant.patterns import matches, problem

NAMES = [
    "lm_head",
    "model.embed_tokens",
    "model.layers.0.mlp.up_proj",
    "model.layers.10.mlp.down_proj",
    "model.layers.3.self_attn.q_proj",
    "model.layers.3.block_sparse_moe.experts.7.w1",
    "vision_tower.blocks.0.attn.qkv",
]
PATTERNS = [
    "re:.*lm_head",
    r"re:model\.layers\.\d+\.mlp\..*",
    r"re:.*layers\.\d+\.mlp\.",
    "re:.*mlp.gate$",
    "re:.*block_sparse_moe.gate",
    "re:vision_tower.*",
    r"re:.*\.(q|k|v|o)_proj",
    r"re:.*self_attn\.[qkv]_proj$",
    r"re:^model\.layers\.(1|2|10)\..*",
    r"re:.*layers\.[0-9]+\..*_proj",
    r"re:(?:model\.)?layers.*",
    r"re:.*experts\.\d{1,2}\.w[123]$",
    "re:(?i)MODEL.*",
    "re:lm_head|model.embed",
    "re:head",
    "re:",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_people_use_mean_what_they_mean_to_python(pattern: str) -> None:
    assert problem(pattern) == ""
    for name in NAMES:
        assert matches(pattern, name) == (re.match(pattern.removeprefix("re:"), name) is not None), name


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> str:
    """Regular expressions over a few letters, dots and digits."""
    if depth == 0:
        return draw(st.sampled_from(["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", r"\w", "1"]))
    parts = draw(st.lists(expressions(depth=depth - 1), min_size=1, max_size=3))
    joined = draw(st.sampled_from(["", "|"])).join(parts)
    return f"(?:{joined}){draw(st.sampled_from(['', '*', '+', '?', '{2}', '{1,3}', '*?', '$']))}"


@given(expressions(), st.text("ab1.", max_size=6))
def test_any_expression_means_what_it_means_to_python(expression: str, name: str) -> None:
    assert problem(f"re:{expression}") == ""
    assert matches(f"re:{expression}", name) == (re.match(expression, name) is not None)


def test_a_name_without_a_prefix_is_only_itself() -> None:
    assert matches("model.layers", "model.layers")
    assert not matches("model.layers", "model_layers")
    assert not matches("model", "model.layers")


@pytest.mark.parametrize("pattern", ["re:(a+)+$", r"re:(.*)*\d$", "re:(a|a)*b", "re:(.*.*.*)*x"])
def test_a_pattern_that_takes_python_for_ever_is_answered_at_once(pattern: str) -> None:
    began = time.process_time()
    assert problem(pattern) == ""
    assert not matches(pattern, "a" * 5000 + "!")
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("re:(?!.*lm_head).*", "RE2 takes: no lookaround, no backreference; invalid perl operator: (?!"),
        ("re:(?<=a)b", "invalid perl operator: (?<="),
        (r"re:(a)\1", r"invalid escape sequence: \1"),
        ("re:a{2000}", "invalid repetition size: {2000}"),
        ("re:(", "a regular expression; missing ), unterminated subpattern at position 0"),
        ("re:[[:alpha:]]", "a regular expression; Possible nested set"),
        (r"re:\pL", r"a regular expression; bad escape \p"),
    ],
)
def test_what_cannot_be_taken_is_named(pattern: str, words: str) -> None:
    assert words in problem(pattern)


def test_a_pattern_of_great_size_is_refused_and_not_computed() -> None:
    began = time.process_time()
    assert problem("re:" + "((((a{1000}){1000}){1000}){1000})") != ""
    assert time.process_time() - began < 1
