"""What vLLM's parameters of a request do to its tokens and its text, on the toy model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import NoBadWordsLogitsProcessor

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.sampling.params import SamplingParams

from . import toy
from .stepping import greedy, run

PROMPT = [1, 2]


def continued(forbid: Sequence[Sequence[int]], allowed: Sequence[int] | None, number: int) -> list[int]:
    """Greedy tokens after PROMPT by transformers' processor of logits."""
    words = LogitsProcessorList([NoBadWordsLogitsProcessor([list(word) for word in forbid])] if forbid else [])
    output: list[int] = []
    for _ in range(number):
        logits = toy.logits_after([*PROMPT, *output])[None].clone()
        if allowed is not None:
            logits[:, [token for token in range(toy.VOCAB) if token not in allowed]] = -torch.inf
        output.append(int(words(torch.tensor([output], dtype=torch.int64), logits).argmax()))
    return output


def test_only_allowed_tokens_are_chosen(engine: LLMEngine) -> None:
    allowed = [5, 70, 71, 72, 200]
    got = run(engine, PROMPT, greedy(10, allowed_token_ids=allowed)).outputs[0].token_ids
    assert got == continued([], allowed, 10)
    params = SamplingParams(max_tokens=30, temperature=5.0, ignore_eos=True, seed=-3, allowed_token_ids=allowed)
    assert set(run(engine, PROMPT, params).outputs[0].token_ids) == set(allowed)
    with pytest.raises(UserError, match="258 is not a token id"):
        engine.add_request("r", PROMPT, greedy(allowed_token_ids=[1, toy.VOCAB]))


def test_bad_words_are_not_in_the_output(engine: LLMEngine) -> None:
    usual = toy.expected(PROMPT, 12)
    words = [bytes(usual[start:end]).decode("latin1") for start, end in ((2, 3), (5, 8))]
    tokens = [engine.require_tokenizer().encode(word, add_special_tokens=False) for word in words]
    got = run(engine, PROMPT, greedy(12, bad_words=words)).outputs[0].token_ids
    assert got == continued(tokens, None, 12)
    assert run(engine, PROMPT, greedy(12, bad_words=["\x00\x01\x02 not there"])).outputs[0].token_ids == usual


def test_bad_words_of_several_tokens_may_begin(engine: LLMEngine) -> None:
    ascii_only = list(range(32, 127))
    usual = continued([], ascii_only, 12)
    word = bytes(usual[3:6]).decode()
    got = run(engine, PROMPT, greedy(12, allowed_token_ids=ascii_only, bad_words=[word])).outputs[0]
    assert got.token_ids == continued([usual[3:6]], ascii_only, 12)
    assert got.token_ids[:5] == usual[:5]
    assert got.token_ids[5] != usual[5]
    assert word not in got.text


@pytest.mark.parametrize(("number", "kept"), [(None, 12), (3, 3), (12, 12), (40, 12)])
def test_a_prompt_is_truncated_at_its_beginning(engine: LLMEngine, number: int | None, kept: int) -> None:
    prompt = list(range(12))
    output = run(engine, prompt, greedy(3, truncate_prompt_tokens=number))
    assert output.prompt_token_ids == prompt[-kept:]
    assert output.outputs[0].token_ids == toy.expected(prompt[-kept:], 3)


def test_a_prompt_is_truncated_to_what_fits(engine: LLMEngine) -> None:
    prompt = list(range(100))
    assert run(engine, prompt, greedy(1, truncate_prompt_tokens=-1)).prompt_token_ids == prompt[-16:]


def test_the_text_may_include_what_ends_it(engine: LLMEngine) -> None:
    ascii_only = list(range(32, 127))
    text = bytes(continued([], ascii_only, 12)).decode()
    for end in (text[4:6], text[7]):
        before = text[: text.index(end)]
        got = run(engine, PROMPT, greedy(12, allowed_token_ids=ascii_only, stop=end))
        assert (got.outputs[0].text, got.outputs[0].stop_reason) == (before, end)
        params = greedy(12, allowed_token_ids=ascii_only, stop=end, include_stop_str_in_output=True)
        assert run(engine, PROMPT, params).outputs[0].text == before + end
        params = greedy(
            12, allowed_token_ids=ascii_only, stop_token_ids=[ord(end[-1])], include_stop_str_in_output=True
        )
        assert run(engine, PROMPT, params).outputs[0].text == text[: text.index(end[-1]) + 1]


def test_without_detokenizing_there_are_tokens_and_no_text(engine: LLMEngine) -> None:
    output = run(engine, "ab", greedy(4, detokenize=False)).outputs[0]
    assert (output.token_ids, output.text) == (toy.expected(b"ab", 4), "")


def test_log_probabilities_of_all_tokens(engine: LLMEngine) -> None:
    output = run(engine, PROMPT, greedy(1, logprobs=-1, prompt_logprobs=-1))
    assert output.outputs[0].logprobs is not None
    assert output.prompt_logprobs is not None
    for entry, before in ((output.outputs[0].logprobs[0], PROMPT), (output.prompt_logprobs[1], PROMPT[:1])):
        assert entry is not None
        found = np.array([entry[token].logprob for token in range(toy.VOCAB)])
        np.testing.assert_allclose(found, toy.logits_after(before).log_softmax(-1), rtol=1e-5)


def test_seeds_with_a_sign(engine: LLMEngine) -> None:
    def sampled(seed: int | None, name: str = "r") -> list[int]:
        engine.add_request(name, PROMPT, SamplingParams(max_tokens=20, ignore_eos=True, seed=seed))
        while engine.has_unfinished_requests():
            outputs = engine.step()
        return outputs[0].outputs[0].token_ids

    assert sampled(-7) == sampled(-7, "other") != sampled(7)
    assert sampled(-1) == sampled(None) != sampled(-1, "other")
