"""Prompts that begin alike: the same greedy tokens as transformers, with and without prefix caching."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import grid
from reference import beams, greedy
from test_models.tiny import MODELS, load, save_random_model

from furiosa_build.runtime import LLMEngine, SamplingParams
from furiosa_build.runtime.engine import StepFailedError

BuildArtifact = Callable[..., Path]

BUCKETS: dict[str, Any] = {
    "prefill_buckets": [[1, 32], [2, 32]],
    "append_buckets": [[1, 8, 128], [2, 8, 128]],
    "decode_buckets": [[4, 128]],
}
BEAMS = {"beam_width": 2, "max_new_tokens": 12}
NEW = {1: 10, 2: 4}
"""Tokens to generate, by the number of beams."""


def prompts(vocab_size: int) -> list[list[int]]:
    """Of up to 60 tokens, that begin as others do, at block boundaries and elsewhere."""
    generator = torch.Generator().manual_seed(29)
    text = torch.randint(3, vocab_size, (60,), generator=generator).tolist()
    other = torch.randint(3, vocab_size, (60,), generator=generator).tolist()
    cuts = (1, 8, 16, 17, 31, 32, 48)
    return [text[:16], text[:32], text, *(text[:cut] + other[cut : cut + 9] for cut in cuts), other[:40]]


def reference(model: Any, prompt: list[int], new: int, width: int = 1) -> list[int]:
    """The best beam, or without beams the greedy continuation."""
    return greedy(model, prompt, new) if width == 1 else beams(model, prompt, new, width)[0][0]


def params(new: int, width: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, use_beam_search=width > 1)


@pytest.mark.parametrize("name", grid(["qwen3", "mistral"], ["mistral"]))
@pytest.mark.parametrize("block_size", [1, 16])
def test_the_same_tokens_as_transformers(
    name: str, block_size: int, tmp_path: Path, build_artifact: BuildArtifact
) -> None:
    """Requests that come, are aborted and preempted at random. The window of mistral (12) is shorter than a prefix."""
    directory = save_random_model(MODELS[name], tmp_path / name)
    model = load(directory)
    given = prompts(model.config.vocab_size)
    artifact = build_artifact(
        directory, **BUCKETS, paged_attention_block_size=block_size, kv_cache_sharing_across_beams_config=BEAMS
    )
    widths = [2 if number % 4 == 3 else 1 for number in range(len(given))]
    expected = [reference(model, prompt, NEW[width], width) for prompt, width in zip(given, widths, strict=True)]
    cached, preemptions = {True: 0, False: 0}, {True: 0, False: 0}
    for enabled in (True, False):
        for num_blocks in {1: (1024, 72), 16: (64, 9)}[block_size]:
            engine = LLMEngine(artifact, paged_attention_num_blocks=num_blocks, enable_prefix_caching=enabled)
            tokens = run_at_random(engine, given, widths, seed=block_size)
            assert tokens == expected * 2, f"{enabled=} {num_blocks=}"
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)
            cached[enabled] += stats.cached_tokens
            preemptions[enabled] += stats.preemptions
    assert cached[True] > 200
    assert cached[False] == 0
    assert min(preemptions.values()) > 9


def run_at_random(engine: LLMEngine, given: list[list[int]], widths: list[int], seed: int) -> list[list[int]]:
    """The tokens of every prompt, asked for twice. Others with the same prompts are aborted."""
    chance, todo = random.Random(seed), [*range(len(given) * 2)]
    chance.shuffle(todo)
    found: dict[int, list[int]] = {}
    while todo or engine.has_unfinished_requests():
        if todo and chance.random() < 0.6:
            number = todo.pop()
            prompt, width = given[number % len(given)], widths[number % len(given)]
            engine.add_request(str(number), prompt, params(NEW[width], width))
            engine.add_request(f"aborted {number}", prompt, params(12))
        for output in engine.step():
            if output.finished and output.request_id.isdecimal():
                found[int(output.request_id)] = list(output.outputs[0].token_ids)
        engine.check_integrity()
        [replica] = engine._replicas
        if replica.scheduler.running and chance.random() < 0.1:  # more often than for want of blocks
            replica.scheduler.preempt(chance.choice(replica.scheduler.running))
        if chance.random() < 0.3:
            engine.abort_request(f"aborted {chance.randrange(len(given) * 2)}")
            engine.check_integrity()
    return [found[number] for number in range(len(given) * 2)]


def test_the_next_turn_of_a_conversation(tmp_path: Path, build_artifact: BuildArtifact) -> None:
    """Its prompt is the last one, what was answered, and a few tokens more: those few are computed."""
    directory = save_random_model(MODELS["qwen3"], tmp_path / "qwen3")
    model = load(directory)
    engine = LLMEngine(build_artifact(directory, **BUCKETS, paged_attention_block_size=1))
    prompt = prompts(model.config.vocab_size)[1]
    for turn in range(4):
        engine.add_request("r", prompt, params(10))
        while engine.has_unfinished_requests():
            [*_, output] = [None, *engine.step()]
        assert output is not None
        assert output.num_cached_tokens == (0 if turn == 0 else len(prompt) - 4)
        tokens = list(output.outputs[0].token_ids)
        assert tokens == reference(model, prompt, 10)
        prompt = [*prompt, *tokens, 5, 6, 7]
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_tokens) == (32 + 45 + 58 + 71, 41 + 54 + 67)


def test_a_request_of_nan_fails_alone_and_leaves_nothing(tmp_path: Path, build_artifact: BuildArtifact) -> None:
    """Its padding is NaN as well, and all padding is written to one slot; masked, that would still be 0 * NaN.

    Beside it another decodes in a bucket without padding. What begins as it did has no hit, and fails itself.
    """
    directory = save_random_model(MODELS["qwen3"], tmp_path / "qwen3")
    model = load(directory)
    buckets = {
        "prefill_buckets": [[1, 32]],
        "append_buckets": [[1, 8, 128]],
        "decode_buckets": [[1, 128], [2, 128]],
    }
    engine = LLMEngine(build_artifact(directory, **buckets, paged_attention_block_size=1))
    good, bad = prompts(model.config.vocab_size)[1], [*range(3, 40), 2, *range(40, 47)]
    [replica] = engine._replicas
    [runner] = replica.executor._runners
    assert not model.config.tie_word_embeddings, "or every request would have a NaN among its logits"
    runner.parameters["model.embed_tokens.weight"][2] = float("nan")
    for name, prompt in (("good", good), ("bad", bad), ("as bad", bad)):
        engine.add_request(name, prompt, params(30))
    found, failed = {}, {}
    while engine.has_unfinished_requests():
        try:
            outputs = engine.step()
        except StepFailedError as error:
            failed |= error.errors
            outputs = error.outputs
        found |= {output.request_id: output.outputs[0].token_ids for output in outputs if output.finished}
        engine.check_integrity()
    assert failed.keys() == {"bad", "as bad"}
    assert found == {"good": reference(model, good, 30)}
    assert replica.scheduler.blocks.find_cached(bad, len(bad)) == []
    assert len(replica.scheduler.blocks.find_cached(good, len(good))) == len(good)
