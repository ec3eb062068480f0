"""A recipe with a draft: the same greedy tokens as transformers, in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from test_models.tiny import LLAMA
from user_directory import RECIPE, UserDirectory, steps_in_this_process

from furiosa_build.runtime import AsyncEngineArgs, LLMEngine

from .tokens import expected_tokens, generated_tokens, make_users

MODEL: dict[str, Any] = {**LLAMA, "num_key_value_heads": 2, "num_hidden_layers": 3, "dtype": "float32"}
PROMPTS = [[5, 9, 12], [3] * 11, [7, 8, 9, 10, 11, 12, 13], [1, 2], [20, 21, 22, 23], [50]]
NEW = 24
DRAFT = "speculative.recipe=draft"


@pytest.fixture(scope="module", autouse=True)
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """The recipe `draft` is the model itself, quantized: like it, and not the same."""
    made = make_users(tmp_path_factory.mktemp("speculative"), {"llama": MODEL})["llama"]
    (made.root / "recipes" / "draft.yaml").write_text(RECIPE.replace("quantization: none", "quantization: int8"))
    return made


@pytest.fixture(scope="module")
def expected(user: UserDirectory) -> list[list[int]]:
    return expected_tokens(user, PROMPTS, NEW)


@pytest.mark.parametrize(
    ("overrides", "arguments"),
    [
        (["buckets.decode_buckets=[[1,64],[4,64]]", "buckets.paged_attention_block_size=16"], {}),
        pytest.param(
            ["parallel.tensor_parallel_size=2", "parallel.pipeline_parallel_size=2"], {}, marks=pytest.mark.grid
        ),
        pytest.param(["parallel.data_parallel_size=2"], {"num_speculative_tokens": 2}, marks=pytest.mark.grid),
        pytest.param(
            ["scheduler.prefill_chunk_size=4"],
            {"speculative_model_paged_attention_num_blocks": 96},
            marks=pytest.mark.grid,
        ),
    ],
)
def test_the_same_tokens_as_transformers(
    user: UserDirectory, expected: list[list[int]], overrides: list[str], arguments: dict[str, Any]
) -> None:
    artifact = user.package(DRAFT, "buckets.append_buckets=null", *overrides)
    args = AsyncEngineArgs(model=str(artifact), **arguments)
    with closing(LLMEngine.from_engine_args(args, verify="full")) as engine:
        assert generated_tokens(engine, PROMPTS, NEW) == expected
        rate = engine.stats().acceptance_rate
        assert rate is not None
        assert rate > 0.3, "the draft is nearly the model"


def test_the_artifact_is_qualified_with_its_draft(user: UserDirectory) -> None:
    assert user.build(DRAFT, "buckets.append_buckets=null")[-1] == "qualify"
