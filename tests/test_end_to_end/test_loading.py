"""Checkpoints that are stored otherwise than their model has its parameters: artifacts say what transformers says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from grid import grid
from reference import greedy
from test_models.tiny import TIED, load, save_random_model
from test_weights.checkpoints import change_tensors, only_the_head, other_head, rename, same_head
from test_weights.test_loading import MIXTURES

from furiosa_build.build.build import Build
from furiosa_build.runtime import LLM, SamplingParams

PROMPTS = [[5, 9, 13, 17, 2], list(range(3, 40))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)

STORED: dict[str, Callable[[Path], object]] = {
    "experts one by one": lambda directory: save_random_model(MIXTURES["mixtral"], directory),
    "another head": lambda directory: change_tensors(save_random_model(TIED, directory), other_head),
    "the same head": lambda directory: change_tensors(save_random_model(TIED, directory), same_head),
    "only the head": lambda directory: change_tensors(save_random_model(TIED, directory), only_the_head),
    "the bare model": lambda directory: rename(
        save_random_model(TIED, directory), lambda name: name.removeprefix("model.")
    ),
}


@pytest.mark.parametrize("stored", grid(STORED, ["another head"]))
def test_the_artifact_says_what_transformers_says(
    stored: str, tmp_path: Path, build_artifact: Callable[..., Path]
) -> None:
    STORED[stored](tmp_path)
    model = load(tmp_path)
    expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
    outputs = LLM(build_artifact(tmp_path)).generate(PROMPTS, GREEDY)
    assert [output.outputs[0].token_ids for output in outputs] == expected


@pytest.mark.grid
def test_a_head_that_is_the_embedding_stays_tied(tmp_path: Path, start_build: Callable[..., Build]) -> None:
    """It is not stored twice, and not quantized."""
    change_tensors(save_random_model(TIED, tmp_path), same_head)
    build = start_build(tmp_path)
    assert "lm_head.weight" not in build.plan.model.outline.parameters
