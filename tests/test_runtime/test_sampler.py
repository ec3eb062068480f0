"""The filters against transformers' LogitsProcessors, and the draw against the distribution it is from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from furiosa_build.backends.device import as_float32
from furiosa_build.backends.torch_device import TorchDevice
from furiosa_build.core.errors import BuildError
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.sampling.sampler import (
    Random,
    distribution,
    penalize,
    sample,
    top_logprobs,
)
from furiosa_build.runtime.sampling.selection import Floats

VOCAB = 300


def row(seed: int, scale: float = 4.0, vocab: int = VOCAB) -> Floats:
    values = np.random.default_rng(seed).normal(size=vocab) * scale
    return values.astype(np.float32)


def by_transformers(logits: Floats, warpers: list[Any], context: list[int] | None = None) -> Floats:
    scores = torch.from_numpy(logits.copy())[None]
    for warper in warpers:
        scores = warper(torch.tensor([context or [0]]), scores)
    return np.asarray(scores.softmax(-1)[0].numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_as_float32(dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).reshape(4, -1)[:, 1:]
    found = torch.from_numpy(as_float32(TorchDevice().to_numpy(every)))
    assert found.dtype == torch.float32
    assert torch.equal(found.isnan(), every.isnan())
    assert torch.equal(found.nan_to_num(0.5), every.float().nan_to_num(0.5))


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 5, 50, VOCAB, 1000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_filters_are_those_of_transformers_in_its_order(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = row(seed)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    warpers: list[Any] = [hf.TemperatureLogitsWarper(temperature)]
    warpers += [hf.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [hf.TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [hf.MinPLogitsWarper(min_p)] if min_p else []
    ours, theirs = distribution(logits, params), by_transformers(logits, warpers)
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-9)


def test_each_filter_alone_drops_something() -> None:
    for params in (SamplingParams(top_k=5), SamplingParams(top_p=0.5), SamplingParams(min_p=0.1)):
        assert 0 < (distribution(row(0), params) > 0).sum() < VOCAB


def test_ties_at_the_border_of_top_k_are_kept_as_in_transformers() -> None:
    logits = np.array([1, 3, 2, 2, 2, 0], dtype=np.float32)
    ours = distribution(logits, SamplingParams(top_k=2))
    np.testing.assert_allclose(ours, by_transformers(logits, [hf.TopKLogitsWarper(2)]), rtol=1e-5)
    assert (ours > 0).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("top_k", [1, 5, 50, 400])
@pytest.mark.parametrize("scale", [4.0, 1e-6])
def test_top_k_in_a_large_vocabulary(top_k: int, scale: float) -> None:
    logits = np.round(row(2, scale, vocab=20_011), 7)  # there are ties, of the small ones thousands
    logits[::3] = -np.inf
    ours = distribution(logits, SamplingParams(top_k=top_k))
    theirs = by_transformers(logits, [hf.TopKLogitsWarper(top_k)])
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-9)


def test_top_p_in_a_large_flat_vocabulary() -> None:
    """Where every token is near the bound under which tokens are not looked at."""
    logits = row(1, scale=0.01, vocab=50_000)
    kept = (distribution(logits, SamplingParams(top_p=0.7)) > 0).sum()
    theirs = (by_transformers(logits, [hf.TopPLogitsWarper(0.7)]) > 0).sum()
    assert abs(int(kept) - int(theirs)) <= 5  # their sums are rounded to float32


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    penalty=st.sampled_from([0.5, 1.1, 2.0]),
    prompt=st.lists(st.integers(0, VOCAB - 1), max_size=20),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=20),
)
def test_repetition_penalty_is_that_of_transformers(
    seed: int, penalty: float, prompt: list[int], output: list[int]
) -> None:
    if not prompt + output:
        return
    logits = row(seed)
    before = logits.copy()
    ours = penalize(logits, SamplingParams(repetition_penalty=penalty), prompt, output)
    theirs = hf.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + output]), torch.from_numpy(before.copy())[None]
    )
    np.testing.assert_array_equal(ours, theirs[0].numpy())
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("penalty", [5e-324, 1e-30, 1e30, 1.7e308])
def test_no_repetition_penalty_makes_logits_that_are_none(penalty: float) -> None:
    logits = np.array([-np.inf, -5, 0, 5, 1], dtype=np.float32)
    penalized = penalize(logits, SamplingParams(repetition_penalty=penalty), [0, 1, 2, 3], [])
    assert (penalized[0], penalized[4]) == (-np.inf, 1)
    assert np.isfinite(penalized[1:]).all()
    params = SamplingParams(repetition_penalty=penalty, temperature=1e-4)
    likeliest = 3 if penalty < 1 else 4
    assert sample(logits, params, prompt=[0, 1, 2, 3], output=[], generator=Random(0)) == likeliest


def test_presence_and_frequency_penalties_count_the_output_only() -> None:
    logits = np.zeros(5, dtype=np.float32)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    assert penalize(logits, params, [0, 0, 1], [1, 2, 2, 2]).tolist() == [0, -0.75, -1.25, 0, 0]
    assert logits.tolist() == [0] * 5
    assert penalize(logits, params, [0], []) is logits


def pick(logits: Floats, params: SamplingParams, generator: Random | None = None, **kwargs: Any) -> int:
    return sample(logits, params, prompt=[], output=[], generator=generator, **kwargs)


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    assert pick(np.array([0, 7, 7, 1], dtype=np.float32), SamplingParams(temperature=0)) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_are_not_chosen(temperature: float) -> None:
    logits = np.array([9, 9, 0, -5], dtype=np.float32)
    generator = Random(0)
    params = SamplingParams(temperature=temperature, top_k=1)
    assert pick(logits, params, generator, forbidden={0, 1}) == 2
    assert logits.tolist() == [9, 9, 0, -5]


def test_draws_follow_the_distribution() -> None:
    logits, params = row(3, scale=1.0, vocab=8), SamplingParams(temperature=0.8, top_k=6)
    generator = Random(0)
    draws = [pick(logits, params, generator) for _ in range(20_000)]
    frequencies = np.bincount(draws, minlength=8) / len(draws)
    np.testing.assert_allclose(frequencies, distribution(logits, params), atol=0.012)


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**40 + 12345, 2**63 - 1])
def test_random_numbers_are_those_of_torch(seed: int) -> None:
    """So that a seed gives the texts that it always gave."""
    ours, theirs = Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(700):  # more than one state of the twister
        assert ours.next() == float(torch.rand((), dtype=torch.float64, generator=theirs))


def test_a_draw_takes_one_random_number_whatever_the_candidates() -> None:
    """So the place in the stream depends on the number of tokens only."""
    states = set()
    for params in (SamplingParams(), SamplingParams(top_k=2), SamplingParams(top_p=0.3)):
        generator = Random(9)
        pick(row(1), params, generator)
        states.add(generator.next())
    assert len(states) == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[np.nan, 1.0], [1.0, np.nan], [-np.inf, -np.inf], [np.inf, 0.0]])
def test_logits_without_a_maximum_are_an_error(bad: list[float], temperature: float) -> None:
    with pytest.raises(BuildError, match="no usable maximum"):
        pick(np.array(bad, dtype=np.float32), SamplingParams(temperature=temperature))


def test_top_logprobs() -> None:
    logits = row(4)
    logprobs = torch.from_numpy(logits).log_softmax(-1)
    order = logprobs.argsort(descending=True).tolist()
    entries = top_logprobs(logits, order[7], 3)
    assert [(id_, rank) for id_, _, rank in entries] == [(order[7], 8), *zip(order[:3], (1, 2, 3), strict=True)]
    np.testing.assert_allclose([value for _, value, _ in entries], logprobs[[id_ for id_, _, _ in entries]], rtol=1e-5)
    assert [id_ for id_, _, _ in top_logprobs(logits, order[1], 3)] == [order[1], order[0], order[2]]
    assert len(top_logprobs(logits, 0, 0)) == 1
    assert len(top_logprobs(logits, 0, 10_000)) == VOCAB


def test_logit_bias_is_transformers_sequence_bias() -> None:
    logits, biases = row(3), {5: 2.5, 200: -100.0, 7: 100.0}
    by_hf = hf.SequenceBiasLogitsProcessor([[[token], bias] for token, bias in biases.items()])
    expected = by_hf(torch.tensor([[1, 2]]), torch.from_numpy(logits.copy())[None])[0].numpy()
    biased = penalize(logits, SamplingParams(logit_bias=biases), [1, 2], [])
    np.testing.assert_array_equal(biased, expected)
    assert sample(logits, SamplingParams(temperature=0, logit_bias=biases), prompt=[1], output=[]) == 7


def by_float64(logits: Floats, params: SamplingParams) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Probabilities, plainly and in float64; and the tokens that the last digit of a sum decides about."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / params.temperature)
    if 0 < params.top_k < len(logits):
        weights[logits < np.sort(logits)[-params.top_k]] = 0
    order = np.argsort(-weights, kind="stable")
    before = np.empty_like(weights)
    before[order] = np.cumsum(weights[order]) - weights[order]
    before /= weights.sum()
    uncertain = np.isclose(before, params.top_p, rtol=1e-5) | np.isclose(weights, params.min_p, rtol=1e-5)
    if params.top_p < 1:
        # Equal weights may be told apart by the last digit of what they were computed of.
        last = weights[before < params.top_p].min()
        uncertain |= np.isclose(weights, last, rtol=1e-5)
        weights[before >= params.top_p] = 0
    weights[weights < params.min_p] = 0
    return weights / weights.sum(), uncertain


@st.composite
def logits_of_any_kind(draw: st.DrawFn) -> Floats:
    """Peaked, flat, with ties, tokens that are impossible, and huge numbers; small vocabularies and large ones."""
    vocabulary = draw(st.sampled_from([1, 2, 63, 1000, 4096, 20_011]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = generator.normal(size=vocabulary) * draw(st.sampled_from([0.0, 1e-4, 0.5, 3.0, 30.0, 1e37]))
    logits[generator.integers(vocabulary, size=draw(st.sampled_from([0, 1, 40])))] += draw(st.sampled_from([5, 20.0]))
    if draw(st.booleans()):
        logits = np.round(logits)
    logits[generator.random(vocabulary) < draw(st.sampled_from([0.0, 0.5, 0.99]))] = -np.inf
    if np.isneginf(logits).all():
        logits[0] = 0
    return logits.astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    logits=logits_of_any_kind(),
    temperature=st.sampled_from([1e-4, 0.3, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 7, 400, 3000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.9999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-3, 0.2]),
)
def test_probabilities_are_those_of_float64(
    logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found, (expected, uncertain) = distribution(logits, params), by_float64(logits, params)
    assert np.isclose(found.sum(dtype=np.float64), 1, rtol=1e-5)
    differ = (found > 0) != (expected > 1e-40)  # float32 has no smaller ones
    differ &= expected.astype(np.float32) * (found == 0) + found > 1e-37
    assert not (differ & ~uncertain).any()
    if not differ.any():
        # The exponent of a weight is of float32: it is off by its distance from 0 times 2**-24 or so.
        np.testing.assert_allclose(found, expected, rtol=3e-5, atol=1e-37)


@settings(max_examples=60, deadline=None)
@given(logits=logits_of_any_kind(), seed=st.integers(0, 2**32), top_p=st.sampled_from([0.5, 1.0]))
def test_a_draw_inverts_the_distribution_function(logits: Floats, seed: int, top_p: float) -> None:
    params = SamplingParams(top_p=top_p)
    token = pick(logits, params, Random(seed))
    ends = np.cumsum(distribution(logits, params), dtype=np.float64)
    point = Random(seed).next() * ends[-1]
    assert (ends[token - 1] if token else 0) - 1e-6 <= point <= ends[token] + 1e-6
    assert distribution(logits, params)[token] > 0


def test_draws_from_a_large_vocabulary_follow_the_distribution() -> None:
    """A chi-squared test over cells of many tokens, which cross the blocks that are summed."""
    logits, generator = row(5, scale=2.0, vocab=20_021), Random(1)
    cells = np.arange(20_021) // 1000
    expected = np.bincount(cells, weights=distribution(logits, SamplingParams())) * 3000
    counts = np.bincount(cells[[pick(logits, SamplingParams(), generator) for _ in range(3000)]], minlength=21)
    statistic = ((counts - expected) ** 2 / expected).sum()
    half = torch.tensor([20 / 2, statistic / 2], dtype=torch.float64)
    assert 1e-3 < float(torch.special.gammaincc(half[0], half[1])) < 1 - 1e-3


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_only_tokens_that_a_guide_allows_are_chosen(temperature: float) -> None:
    logits, allowed = row(6, vocab=1003), np.arange(1003) % 3 == 1
    logits[0] = np.inf  # and what is not allowed need not be a number to choose from
    without = np.where(allowed, logits, np.float32(-np.inf))
    params = SamplingParams(temperature=temperature, top_k=40)
    before = logits.copy()
    for seed in range(20):
        token = pick(logits, params, Random(seed), allowed=allowed)
        assert allowed[token]
        assert token == pick(without, params, Random(seed))
    np.testing.assert_array_equal(logits, before)


@settings(max_examples=60, deadline=None)
@given(logits=logits_of_any_kind(), number=st.sampled_from([0, 1, 5, 300]), place=st.integers(0, 10**6))
def test_log_probabilities_are_those_of_torch(logits: Floats, number: int, place: int) -> None:
    token = place % len(logits)
    expected = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    [own, *others] = top_logprobs(logits, token, number)
    assert own[0] == token
    assert own[2] == 1 + (logits > logits[token]).sum()
    likeliest = np.argsort(-logits, kind="stable")[:number]
    assert [id_ for id_, _, _ in others] == [id_ for id_ in likeliest if id_ != token]
    for id_, logprob, _ in (own, *others):
        np.testing.assert_allclose(logprob, expected[id_], rtol=2e-6, atol=2e-6)
