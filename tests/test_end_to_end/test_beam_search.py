"""Beam search by the runtime: the sequences and scores of transformers' `generate(num_beams=...)` in float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Beams, beams
from test_models.tiny import LLAMA, MISTRAL, load, save_random_model
from user_directory import furiosa_build, make_user_directory, steps_in_this_process

from furiosa_build.runtime import LLMEngine, RequestOutput, SamplingParams
from furiosa_build.runtime.scheduling.kv_cache import BlockManager
from furiosa_build.runtime.scheduling.scheduler import Scheduler

from .test_parallel import MODELS as CUT_MODELS

BuildArtifact = Callable[..., Path]

WIDTH, NEW = 4, 14
LENGTHS = (1, 7, 16, 21)
SCORE_TOLERANCE = 1e-4
"""A sum of 14 log probabilities of float32 logits, which differ from transformers' by up to 3e-5."""

BUCKETS: dict[str, Any] = {
    "prefill_buckets": [[1, 16], [2, 32]],
    "decode_buckets": [[1, 32], [2, 48]],
    "kv_cache_sharing_across_beams_config": {"beam_width": WIDTH, "max_new_tokens": NEW},
}
OPTIONS: list[dict[str, Any]] = [
    {"length_penalty": length_penalty, "early_stopping": early_stopping}
    for length_penalty, early_stopping in ((1.0, False), (0.0, True), (2.0, "never"), (-0.5, False), (1.0, True))
]


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(29)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def params(ends: list[int], options: dict[str, Any]) -> SamplingParams:
    return SamplingParams(
        use_beam_search=True, n=WIDTH, max_tokens=NEW, ignore_eos=True, stop_token_ids=ends, temperature=0, **options
    )


def check(output: RequestOutput, expected: Beams, length_penalty: float) -> None:
    assert [completion.token_ids for completion in output.outputs] == [tokens for tokens, _ in expected]
    for completion, (tokens, score) in zip(output.outputs, expected, strict=True):
        assert completion.cumulative_logprob is not None
        found = completion.cumulative_logprob / len(tokens) ** length_penalty
        assert found == pytest.approx(score, abs=SCORE_TOLERANCE)


def drain(engine: LLMEngine) -> dict[str, RequestOutput]:
    """The output of every request. The engine's state is consistent after every step."""
    found = {}
    while engine.has_unfinished_requests():
        found.update((output.request_id, output) for output in engine.step() if output.finished)
        engine.check_integrity()
    pools = [replica.scheduler.blocks for replica in engine._replicas]
    assert all(blocks.num_free == blocks.num_blocks for blocks in pools)
    return found


def test_sequences_and_scores_are_those_of_transformers(tmp_path: Path, build_artifact: BuildArtifact) -> None:
    """Several prompts at once, in blocks of one and of many tokens, with end tokens that some beams meet."""
    directory = save_random_model({**MISTRAL, "vocab_size": 96}, tmp_path / "model")
    model = load(directory)
    given = prompts(96)
    ends = list(range(10, 60, 3))
    artifacts = [build_artifact(directory, **BUCKETS, paged_attention_block_size=size) for size in (1, 16)]
    engines = [LLMEngine(artifact) for artifact in artifacts]
    lengths = set()
    for end_tokens, options in itertools.product(([], ends), OPTIONS):
        expected = [beams(model, prompt, NEW, WIDTH, end_tokens, **options) for prompt in given]
        for engine in engines:
            for number, prompt in enumerate(given):
                engine.add_request(str(number), prompt, params(end_tokens, options))
            outputs = drain(engine)
            for number, found in enumerate(expected):
                check(outputs[str(number)], found, options["length_penalty"])
                lengths.update(len(tokens) for tokens, _ in found)
    assert len(lengths) > 3


@pytest.mark.grid
def test_ordinary_requests_beside_beams_and_little_room(tmp_path: Path, build_artifact: BuildArtifact) -> None:
    """Some are preempted and recomputed."""
    directory = save_random_model(LLAMA, tmp_path / "model")
    model = load(directory)
    given = prompts(192)
    artifact = build_artifact(directory, **BUCKETS, paged_attention_block_size=1)
    expected = [beams(model, prompt, NEW, WIDTH, **OPTIONS[0]) for prompt in given]
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)

    def outputs(num_blocks: int | None) -> tuple[dict[str, RequestOutput], int]:
        preempted = 0
        with pytest.MonkeyPatch.context() as patch:
            preempt = Scheduler.preempt

            def count(self: Scheduler, request: Any) -> None:
                nonlocal preempted
                preempted += request.beams is not None and request.num_generated > 0
                preempt(self, request)

            patch.setattr(Scheduler, "preempt", count)
            # With it the tokens that they have alike would take too few blocks.
            engine = LLMEngine(artifact, paged_attention_num_blocks=num_blocks, enable_prefix_caching=False)
            for number, prompt in enumerate(given):
                engine.add_request(f"g{number}", prompt, greedy)
                engine.add_request(f"b{number}", prompt, params([], OPTIONS[0]))
            return drain(engine), preempted

    roomy, preempted = outputs(1000)
    assert preempted == 0
    tight, preempted = outputs(21 + WIDTH * (NEW - 1))  # enough for the longest prompt and its beams alone
    assert preempted > 0
    for found in (roomy, tight):
        for number in range(len(given)):
            check(found[f"b{number}"], expected[number], 1.0)
            assert found[f"g{number}"].outputs[0].token_ids == roomy[f"g{number}"].outputs[0].token_ids
    assert roomy["g0"].outputs[0].token_ids[:NEW] != roomy["b0"].outputs[0].token_ids, "beams find something better"


def test_the_prompts_blocks_are_shared(tmp_path: Path, build_artifact: BuildArtifact) -> None:
    """While decoding: the prompt once, and what the beams have of their own."""
    directory = save_random_model(LLAMA, tmp_path / "model")
    engine = LLMEngine(build_artifact(directory, **BUCKETS, paged_attention_block_size=1))
    [replica] = engine._replicas
    blocks: BlockManager = replica.scheduler.blocks
    engine.add_request("r", prompts(192)[3], params([], OPTIONS[0]))
    used = []
    while engine.has_unfinished_requests():
        engine.step()
        used.append(blocks.num_blocks - blocks.num_free)
    assert used[0] == 21
    assert used[-1] == 0
    for new, number in enumerate(used[1:-1], start=1):
        assert 21 + new <= number <= 21 + WIDTH * new
    assert max(used) > 21 + NEW, "the beams differ"
    assert max(used) < WIDTH * 21


@pytest.mark.grid
def test_ranks_stages_and_replicas(tmp_path: Path) -> None:
    """And prompts in pieces."""
    model = save_random_model(CUT_MODELS["llama"], tmp_path / "m" / "tiny")
    user = make_user_directory(tmp_path / "user", tmp_path / "store", model)
    with steps_in_this_process():
        user.build(
            "parallel.tensor_parallel_size=2",
            "parallel.pipeline_parallel_size=2",
            "parallel.data_parallel_size=2",
            "scheduler.prefill_chunk_size=8",
            "buckets.append_buckets=null",
            "buckets.prefill_buckets=[[1,8]]",
            "buckets.decode_buckets=[[2,64]]",
            f"buckets.kv_cache_sharing_across_beams_config={{beam_width: {WIDTH}, max_new_tokens: {NEW}}}",
        )
    assert "4 beams of up to 14 tokens" in furiosa_build(user, "inspect", "artifacts/tiny/latest").out
    loaded = load(user.root / "tiny")
    given = prompts(192)
    with closing(LLMEngine(user.artifacts / "latest")) as engine:
        for number, prompt in enumerate(given):
            engine.add_request(str(number), prompt, params([], OPTIONS[0]))
        outputs = drain(engine)
    for number, prompt in enumerate(given):
        check(outputs[str(number)], beams(loaded, prompt, NEW, WIDTH, **OPTIONS[0]), 1.0)
