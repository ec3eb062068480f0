"""Prompts that are prefilled in pieces: the same greedy tokens as transformers, which takes them whole."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import greedy
from test_models.tiny import MODELS, load, save_random_model
from user_directory import UserDirectory, furiosa_build, make_user_directory, steps_in_this_process

from furiosa_build.runtime import LLMEngine, SamplingParams

from .test_parallel import MODELS as CUT_MODELS

BuildArtifact = Callable[..., Path]

LENGTHS = (1, 5, 16, 33, 48, 90)
NEW = 12

# Pieces of one prompt and of several; the longest prompt is longer than every prefill bucket.
BUCKETS: dict[str, Any] = {
    "prefill_buckets": [[1, 16], [2, 32]],
    "append_buckets": [[1, 8, 128], [1, 16, 128], [2, 32, 128]],
    "decode_buckets": [[4, 128]],
}
FEW_BUCKETS: dict[str, Any] = {
    "prefill_buckets": [[1, 16]],
    "append_buckets": [[2, 16, 128]],
    "decode_buckets": [[4, 128]],
}


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(23)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def generate(engine: LLMEngine, given: list[list[int]]) -> tuple[list[list[int]], list[tuple[str, int]]]:
    """The tokens of every prompt, and of each batch of the first replica its phase and most new tokens of a row."""
    for number, prompt in enumerate(given):
        engine.add_request(str(number), prompt, SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True))
    found: dict[int, list[int]] = {}
    batches = []
    while engine.has_unfinished_requests():
        replica = engine._replicas[0]
        replica.fill()
        if replica.in_flight:
            batch = replica.in_flight[0][0]
            batches.append((batch.pipeline.phase, max(batch.counts)))
        for output in engine.step():
            if output.finished:
                found[int(output.request_id)] = list(output.outputs[0].token_ids)
        engine.check_integrity()
    return [found[number] for number in range(len(given))], batches


@pytest.mark.parametrize(
    ("name", "buckets", "chunk_sizes"),
    [
        pytest.param("mistral", BUCKETS, (None, 1, 7, 16, 32), marks=pytest.mark.grid),
        ("gemma3", FEW_BUCKETS, (None, 7)),
    ],
)
def test_the_same_tokens_as_transformers(
    name: str,
    buckets: dict[str, Any],
    chunk_sizes: tuple[int | None, ...],
    tmp_path: Path,
    build_artifact: BuildArtifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The window of mistral and gemma3 (12) is shorter than a piece, and than what comes before one."""
    directory = save_random_model(MODELS[name], tmp_path / name)
    model = load(directory)
    given = prompts(model.config.vocab_size)
    expected = [greedy(model, prompt, NEW) for prompt in given]
    largest = max(length for _, length in buckets["prefill_buckets"])
    for block_size in (1, 16):
        artifact = build_artifact(directory, **buckets, paged_attention_block_size=block_size)
        for chunk_size in chunk_sizes:
            engine = LLMEngine(artifact)
            for replica in engine._replicas:
                monkeypatch.setattr(replica.scheduler._buckets, "_chunk_size", chunk_size)
            tokens, batches = generate(engine, given)
            assert tokens == expected, f"block size {block_size}, chunks of {chunk_size}"
            assert {"append", "decode"} <= {phase for phase, _ in batches}
            assert max(count for _, count in batches) == (chunk_size or largest)


def test_logits_of_the_last_token_only_and_little_room(tmp_path: Path, build_artifact: BuildArtifact) -> None:
    directory = save_random_model(MODELS["qwen3"], tmp_path / "qwen3")
    model = load(directory)
    given = prompts(model.config.vocab_size)
    artifact = build_artifact(directory, **FEW_BUCKETS, calculate_logit_only_for_last_token=True)
    # 102 tokens of the longest need 7 blocks of 16: the others are preempted.
    tokens, _ = generate(LLMEngine(artifact, paged_attention_num_blocks=9), given)
    assert tokens == [greedy(model, prompt, NEW) for prompt in given]


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    root = tmp_path_factory.mktemp("chunked")
    model = save_random_model(CUT_MODELS["llama"], root / "m" / "tiny")
    return make_user_directory(root / "user", root / "store", model)


@pytest.mark.grid
def test_ranks_stages_and_replicas(user: UserDirectory) -> None:
    """From the recipe's `prefill_chunk_size` alone; the append bucket is derived."""
    overrides = [
        "parallel.tensor_parallel_size=2",
        "parallel.pipeline_parallel_size=2",
        "parallel.data_parallel_size=2",
        "scheduler.prefill_chunk_size=8",
        "buckets.append_buckets=null",
        "buckets.prefill_buckets=[[1,8],[2,16]]",
        "buckets.decode_buckets=[[4,64]]",
    ]
    with steps_in_this_process():
        user.build(*overrides)
    assert "append-1x8x64  " in furiosa_build(user, "plan", "tiny", *overrides).out
    shown = furiosa_build(user, "inspect", "artifacts/tiny/latest").out
    assert "prefill 1x8, 2x16; append 1x8x64; decode 4x64; " in shown
    assert "prefill_chunk_size=8" in shown
    artifact = user.latest()
    assert artifact.generator_config.append_buckets == [(1, 8, 64)]
    model = load(user.root / "tiny")
    given = [prompt[:40] for prompt in prompts(model.config.vocab_size)]
    with closing(LLMEngine(user.artifacts / "latest")) as engine:
        tokens, batches = generate(engine, given)
    assert tokens == [greedy(model, prompt, NEW) for prompt in given]
    assert max(count for _, count in batches) == 8


def test_decode_steps_come_between_the_pieces(user: UserDirectory) -> None:
    with steps_in_this_process():
        user.build("scheduler.prefill_chunk_size=8", "buckets.append_buckets=null", "buckets.decode_buckets=[[4,64]]")
    engine = LLMEngine(user.artifacts / "latest")
    engine.add_request("running", [1, 2, 3], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    engine.step()
    engine.add_request("long", list(range(3, 35)), SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    outputs, phases = [], []
    while not outputs or "long" not in outputs[-1]:
        engine._replicas[0].fill()
        phases.append(engine._replicas[0].in_flight[0][0].pipeline.phase)
        outputs.append([output.request_id for output in engine.step()])
    # Four pieces; a token of the running request between each two.
    assert [phase == "decode" for phase in phases] == [False, True, False, True, False, True, False]
    assert outputs == [[], ["running"], [], ["running"], [], ["running"], ["long"]]
