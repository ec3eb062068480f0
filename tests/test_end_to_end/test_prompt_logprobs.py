"""Log probabilities of prompts against transformers': from the engine, and as OpenAI's and vLLM's fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_models.tiny import LLAMA, load, save_random_model
from torch import Tensor

from furiosa_build.runtime import LLM, EngineArgs, LLMEngine, SamplingParams

TOLERANCE = 1e-4
"""Of float32: prompts are computed in other pieces and batches than transformers computes them."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(LLAMA, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(directory: Path) -> Callable[[list[int]], Tensor]:
    """log_softmax of transformers' logits [tokens, vocab]."""
    model = load(directory)

    def logprobs(prompt: list[int]) -> Tensor:
        with torch.inference_mode():
            return model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)

    return logprobs


def draw(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, LLAMA["vocab_size"], (length,), generator=generator).tolist()


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_in_mixed_batches_with_cached_beginnings_and_pieces(
    directory: Path,
    build_artifact: Callable[..., Path],
    expected: Callable[[list[int]], Tensor],
    chunk_size: int | None,
) -> None:
    artifact = build_artifact(
        directory,
        prefill_buckets=[[1, 32], [4, 32]],
        append_buckets=[[1, 32, 64], [2, 16, 64]],
        decode_buckets=[[4, 64]],
        max_seq_len_to_capture=64,
        paged_attention_block_size=8,
    )
    llm = LLM(artifact)
    llm.engine = LLMEngine.from_engine_args(EngineArgs(model=str(artifact), prefill_chunk_size=chunk_size))
    shared = draw(24, 0)
    prompts = [shared, shared + draw(9, 1), shared + draw(30, 2), draw(1, 3), draw(2, 4), draw(48, 5)]
    llm.generate(prompts[:2], SamplingParams(temperature=0, max_tokens=4))  # the cache has these
    params = [
        SamplingParams(temperature=0, max_tokens=tokens, prompt_logprobs=number)
        for tokens, number in [(3, 2), (0, 0), (2, 5), (0, 1), (4, None), (1, 3)]
    ]
    for prompt, each, output in zip(prompts, params, llm.generate(prompts, params), strict=True):
        if each.prompt_logprobs is None:
            assert output.prompt_logprobs is None
            continue
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        logprobs = expected(prompt)
        for position, (token, entry) in enumerate(zip(prompt[1:], output.prompt_logprobs[1:], strict=True)):
            assert entry is not None
            row = logprobs[position]
            assert set(entry) == {token, *row.topk(each.prompt_logprobs).indices.tolist()}
            for candidate, found in entry.items():
                assert found.logprob == pytest.approx(float(row[candidate]), abs=TOLERANCE)
                assert found.rank == 1 + int((row > row[candidate]).sum())
