"""What ends a request: tokens, strings, lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.sampling.params import SamplingParams

from . import toy
from .stepping import greedy, run


def test_max_tokens_and_the_largest_context(engine: LLMEngine) -> None:
    output = run(engine, [1, 2], greedy(5)).outputs[0]
    assert (len(output.token_ids), output.finish_reason, output.stop_reason) == (5, "length", None)
    for max_tokens in (1000, None):
        output = run(engine, [1, 2], SamplingParams(temperature=0, max_tokens=max_tokens)).outputs[0]
        # The largest decode bucket holds 48: the 47th token is the last that can be run, and gives one more.
        assert (len(output.token_ids), output.finish_reason) == (47, "length")


@pytest.fixture
def ending(toy_backend: toy.ToyBackend, tmp_path: Path) -> tuple[LLMEngine, list[int]]:
    """An engine whose end-of-sequence token is the fifth that follows prompt [1, 2], and those five tokens."""
    del toy_backend
    five = toy.expected([1, 2], 5)
    assert five.index(five[4]) == 4
    files = {"generation_config.json": {"eos_token_id": [five[4], 10**6]}}
    return LLMEngine(toy.write_artifact(tmp_path / "a", model_files=files)), five


def test_end_of_sequence(ending: tuple[LLMEngine, list[int]]) -> None:
    engine, five = ending
    output = run(engine, [1, 2], greedy(ignore_eos=False)).outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (five, "stop", None)
    assert output.text == bytes(five[:4]).decode(errors="replace")
    assert len(run(engine, [1, 2], greedy()).outputs[0].token_ids) == 12


def test_stop_tokens(engine: LLMEngine) -> None:
    five = toy.expected([1, 2], 5)
    output = run(engine, [1, 2], greedy(stop_token_ids=[five[2], 255])).outputs[0]
    assert (output.token_ids, output.finish_reason, output.stop_reason) == (five[:3], "stop", five[2])
    assert output.text == bytes(five[:2]).decode(errors="replace")


def test_min_tokens_forbids_end_tokens_and_stop_strings(ending: tuple[LLMEngine, list[int]]) -> None:
    engine, five = ending
    output = run(engine, [1, 2], greedy(min_tokens=5, ignore_eos=False)).outputs[0]
    assert output.token_ids[:4] == five[:4]
    logits = toy.logits_after([1, 2, *five[:4]]).numpy().copy()
    logits[five[4]] = -np.inf
    assert output.token_ids[4] == logits.argmax()
    output = run(engine, [1, 2], greedy(min_tokens=4, ignore_eos=False)).outputs[0]
    assert output.token_ids == five


def ascii_prompt(length: int) -> list[int]:
    """A prompt after which `length` greedy tokens are all ASCII."""
    return next([a, b] for a in range(256) for b in range(256) if max(toy.expected([a, b], length)) < 128)


def test_stop_strings(engine: LLMEngine) -> None:
    prompt = ascii_prompt(4)
    tokens = toy.expected(prompt, 4)
    text = bytes(tokens).decode()
    for stop in (text[2:4], [text[2:4], text[3:]]):
        output = run(engine, prompt, greedy(stop=stop)).outputs[0]
        assert output.text == text[:2]
        assert (output.token_ids, output.finish_reason, output.stop_reason) == (tokens, "stop", text[2:4])
    late = run(engine, prompt, greedy(stop=[text[1]], min_tokens=3)).outputs[0]
    assert late.text.startswith(text[:3])


def test_a_held_back_beginning_of_a_stop_string_is_given_at_the_end(engine: LLMEngine) -> None:
    prompt = ascii_prompt(4)
    text = bytes(toy.expected(prompt, 4)).decode()
    engine.add_request("r", prompt, greedy(4, stop=text[2:] + "never"))
    texts = []
    while engine.has_unfinished_requests():
        texts += [output.outputs[0].text for output in engine.step()]
    assert texts == [text[:1], text[:2], text[:2], text]


def test_special_tokens_in_the_text(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    parameters = toy.default_parameters()
    parameters["table"][:, toy.BOS] = 99.0  # always the likeliest
    engine = LLMEngine(toy.write_artifact(tmp_path / "a", parameters=parameters))
    assert run(engine, [1], greedy(2)).outputs[0].text == ""
    assert run(engine, [1], greedy(2, skip_special_tokens=False)).outputs[0].text == "<bos><bos>"
