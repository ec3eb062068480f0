"""The search alone against transformers': the same model gives both their logits."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import pytest
import reference
import torch
from test_models.tiny import LLAMA
from transformers import AutoModelForCausalLM, PreTrainedModel

from furiosa_build.core.errors import BuildError
from furiosa_build.models.skeleton import make_config
from furiosa_build.runtime.sampling.beam_search import BeamSearch

VOCAB, NEW = 24, 9
PROMPTS = [[3], [5, 9, 1, 1], [7, 7, 2]]
ENDS: list[list[int]] = [[], [4, 11, 17], list(range(0, VOCAB, 4)), list(range(0, VOCAB, 2))]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = {**LLAMA, "vocab_size": VOCAB, "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    made: PreTrainedModel = AutoModelForCausalLM.from_config(make_config(config), dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.copy_(1.5 * torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return made.eval()


def search(model: PreTrainedModel, prompt: list[int], beams: BeamSearch) -> int:
    """Runs a search to its end; returns its steps."""
    sequences = [prompt]
    for step in itertools.count(1):
        with torch.no_grad():
            logits = model(torch.tensor(sequences)).logits[:, -1].numpy()
        continuations = beams.step(logits)
        if beams.is_done:
            return step
        before = sequences if step > 1 else sequences * beams.width
        sequences = [[*before[each.parent], each.token] for each in continuations]
    raise AssertionError


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.6, 1.0, 3.0])
def test_the_beams_and_scores_are_those_of_transformers(
    model: PreTrainedModel, length_penalty: float, early_stopping: bool | Literal["never"]
) -> None:
    """Tolerance: a score sums up to nine float32 log probabilities, which numpy and torch round differently."""
    lengths = set()
    for width, ends, prompt in itertools.product((2, 4), ENDS, PROMPTS):
        beams = BeamSearch(width, NEW, ends, length_penalty, early_stopping)
        search(model, prompt, beams)
        options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
        expected = reference.beams(model, prompt, NEW, width, ends, **options)
        assert [beam.tokens for beam in beams.finished] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([b.score for b in beams.finished], [s for _, s in expected], rtol=1e-5, atol=1e-5)
        for beam in beams.finished:
            score = beam.cumulative_logprob / len(beam.tokens) ** length_penalty
            assert beam.score == pytest.approx(score, rel=1e-5)
            lengths.add(len(beam.tokens))
    assert NEW in lengths
    assert len(lengths) > 2 or length_penalty > 1, "beams meet an end token in the middle, at different lengths"


def test_early_stopping_saves_steps(model: PreTrainedModel) -> None:
    steps: dict[Any, int] = {}
    for early_stopping in (True, False, "never"):
        steps[early_stopping] = sum(
            search(model, prompt, BeamSearch(3, NEW, ends, 1.0, early_stopping)) for prompt in PROMPTS for ends in ENDS
        )
    assert steps[True] < steps[False] < steps["never"]


@pytest.mark.parametrize("bad", [[0.0, np.nan], [-np.inf, -np.inf], [np.inf, 0.0]])
def test_logits_that_nothing_can_be_chosen_from(bad: list[float]) -> None:
    """Of one beam of several, too."""
    beams = BeamSearch(2, 3)
    with pytest.raises(BuildError, match="no usable maximum"):
        beams.step(np.array([bad], dtype=np.float32))
    beams.step(np.array([[0.0, 1.0]], dtype=np.float32))
    with pytest.raises(BuildError, match="no usable maximum"):
        beams.step(np.array([[0.0, 1.0], bad], dtype=np.float32))


def test_a_vocabulary_of_fewer_tokens_than_candidates() -> None:
    """After the prompt there are three continuations, and four beams."""
    beams = BeamSearch(4, 3)
    logits = np.log(np.array([[0.6, 0.3, 0.1]], dtype=np.float32))
    assert [each.token for each in beams.step(logits)][:3] == [0, 1, 2]
    while not beams.is_done:
        beams.step(np.repeat(logits, 4, axis=0))
    assert [beam.tokens for beam in beams.finished] == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]]
