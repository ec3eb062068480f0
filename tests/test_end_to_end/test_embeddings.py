"""Embeddings against transformers' last hidden state, however the model is divided and its prompts are run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grid import grid
from test_models.tiny import LLAMA, MODELS, load, save_random_model
from torch import Tensor

from furiosa_build.core.errors import UserError
from furiosa_build.runtime import LLM, EngineArgs, LLMEngine, PoolingParams, SamplingParams

BuildArtifact = Callable[..., Path]

LENGTHS = (1, 5, 32, 33, 60)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(12)
    return [torch.randint(3, LLAMA["vocab_size"], (length,), generator=generator).tolist() for length in LENGTHS]


def hidden_states(directory: Path, inputs: list[list[int]]) -> list[Tensor]:
    """Of each prompt's last token, what transformers' base model returns."""
    model = load(directory).base_model
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in inputs]


def assert_embeddings(llm: LLM, directory: Path) -> None:
    raw = [output.outputs.embedding for output in llm.embed(prompts(), PoolingParams(normalize=False))]
    normalized = [output.outputs.embedding for output in llm.embed(prompts())]
    for expected, whole, unit in zip(hidden_states(directory, prompts()), raw, normalized, strict=True):
        torch.testing.assert_close(torch.tensor(whole), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            torch.tensor(unit), torch.nn.functional.normalize(expected, dim=0), rtol=1e-4, atol=1e-5
        )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(LLAMA, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def artifact(llama: Path, build_artifact: BuildArtifact) -> Path:
    return build_artifact(
        llama, append_buckets=[[1, 32, 128], [2, 16, 64]], output_last_hidden_state=True, paged_attention_block_size=8
    )


@pytest.mark.parametrize("name", grid(MODELS, ["gemma3"]))
def test_of_every_family(name: str, tmp_path: Path, build_artifact: BuildArtifact) -> None:
    directory = save_random_model(MODELS[name], tmp_path / name)
    assert_embeddings(LLM(build_artifact(directory, output_last_hidden_state=True)), directory)


@pytest.mark.parametrize(
    "others",
    [
        {"calculate_logit_only_for_last_token": True},
        {"parallel": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}},
    ],
    ids=["last token only", "ranks and stages"],
)
def test_however_the_model_is_built(llama: Path, build_artifact: BuildArtifact, others: dict[str, Any]) -> None:
    llm = LLM(build_artifact(llama, output_last_hidden_state=True, **others))
    assert_embeddings(llm, llama)
    llm.engine.close()


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_beside_completions_with_cached_beginnings_and_in_pieces(
    artifact: Path, llama: Path, chunk_size: int | None
) -> None:
    llm = LLM(artifact)
    llm.engine = LLMEngine.from_engine_args(EngineArgs(model=str(artifact), prefill_chunk_size=chunk_size))
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    alone = [output.outputs[0].token_ids for output in llm.generate(prompts(), params)]
    assert_embeddings(llm, llama)
    outputs: dict[str, Any] = {}
    for number, prompt in enumerate(prompts()):
        llm.engine.add_request(f"text {number}", prompt, params)
        llm.engine.add_request(f"embedding {number}", prompt, PoolingParams())
    while llm.engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in llm.engine.step()}
        llm.engine.check_integrity()
    for number, (tokens, embedded) in enumerate(zip(alone, llm.embed(prompts()), strict=True)):
        assert outputs[f"text {number}"].outputs[0].token_ids == tokens
        found = torch.tensor(outputs[f"embedding {number}"].embedding)
        torch.testing.assert_close(found, torch.tensor(embedded.outputs.embedding), rtol=1e-4, atol=1e-5)
    assert outputs["embedding 4"].num_cached_tokens > 0


def test_scores_are_cosines(artifact: Path, llama: Path) -> None:
    llm, (first, *others) = LLM(artifact), prompts()
    query, *documents = (torch.nn.functional.normalize(state, dim=0) for state in hidden_states(llama, prompts()))
    expected = [float(query @ document) for document in documents]
    assert [each.outputs.score for each in llm.score([first], others)] == pytest.approx(expected, abs=1e-4)
    pairs = llm.score([first] * 4, others)
    assert [each.outputs.score for each in pairs] == pytest.approx(expected, abs=1e-4)
    assert pairs[0].prompt_token_ids == first + others[0]
    for one, other in (([first] * 2, others), ([], others), ([first], [])):
        with pytest.raises(UserError, match="do not go with"):
            llm.score(one, other)


@pytest.mark.grid
def test_dimensions_are_of_models_trained_for_them(tmp_path: Path, build_artifact: BuildArtifact) -> None:
    directory = save_random_model({**LLAMA, "matryoshka_dimensions": [8, 64]}, tmp_path / "matryoshka")
    llm = LLM(build_artifact(directory, output_last_hidden_state=True))
    [output] = llm.embed(prompts()[:1], PoolingParams(dimensions=8))
    [expected] = hidden_states(directory, prompts()[:1])
    found = torch.tensor(output.outputs.embedding)
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected[:8], dim=0), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"16 dimensions are none of the model's\n.*\n.*8, 64"):
        llm.embed(prompts(), PoolingParams(dimensions=16))


def test_what_is_refused(artifact: Path, llama: Path, build_artifact: BuildArtifact) -> None:
    llm = LLM(artifact)
    with pytest.raises(UserError, match="the model was not trained for embeddings of fewer"):
        llm.embed(prompts(), PoolingParams(dimensions=8))
    [embedded], [encoded] = llm.embed(prompts()[:1]), llm.encode(prompts()[:1])
    assert encoded.outputs.data.tolist() == embedded.outputs.embedding
    with pytest.raises(UserError, match="'classify' is not supported"):
        llm.encode(prompts(), pooling_task="classify")
    with pytest.raises(TypeError, match="None is not a prompt"):
        llm.embed([None])  # type: ignore[list-item]
    [output] = llm.embed(prompts()[4:], PoolingParams(truncate_prompt_tokens=7))
    assert output.prompt_token_ids == prompts()[4][-7:]
    with pytest.raises(UserError, match=r"build it with model\.output_last_hidden_state=true"):
        LLM(build_artifact(llama)).embed(prompts())
