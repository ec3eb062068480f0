"""The BuildSpec of a draft model: what is its own, and what is that of the model that it proposes tokens to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.compose import load_recipe
from furiosa_build.recipe.schema import DEFAULT_SPECULATIVE_TOKENS, BuildSpec, Recipe

from .conftest import VALID, Write

OWN = """\
  - override backend: eager
  - override scheduler: default
model: {num_hidden_layers: 2, calculate_logit_only_for_last_token: true}
rewriting: {num_blocks_per_supertask: 2}
quantization: {scheme: int8}
buckets: {decode_buckets: [[1, 64]], append_buckets: [], paged_attention_block_size: 1}
scheduler: {is_offline: true, spare_blocks_ratio: 0.5}
devices: cpu:3
save_dir: elsewhere
num_compile_workers: 7
"""
TARGET = """\
speculative: {recipe: small}
buckets:
  prefill_buckets: [[1, 64]]
  decode_buckets: [[1, 128], [2, 256]]
  paged_attention_num_blocks: 99
  kv_cache_sharing_across_beams_config: {beam_width: 2, max_new_tokens: 8}
scheduler: {spare_blocks_ratio: 0.1, prefill_chunk_size: 16}
"""


def composed(tmp_path: Path, write: Write, target: str, draft: str, *overrides: str) -> Recipe:
    write("recipes/small.yaml", VALID + draft)
    write("recipes/mine.yaml", VALID + target)
    return load_recipe("mine", overrides, cwd=tmp_path)


def test_the_model_is_its_own_and_the_shapes_are_those_it_runs_in(tmp_path: Path, write: Write) -> None:
    recipe = composed(tmp_path, write, TARGET, OWN)
    alone, target = load_recipe("small", cwd=tmp_path).spec, recipe.spec
    assert recipe.draft is not None
    draft = recipe.draft.spec
    for section in ("name", "model", "quantization", "rewriting"):
        assert getattr(draft, section) == getattr(alone, section) != getattr(target, section)
    for section in ("backend", "scheduler"):
        assert getattr(draft, section) == getattr(target, section) != getattr(alone, section)
    assert (draft.devices, draft.target) == (target.devices, target.target)
    of_target = {"paged_attention_num_blocks": None, "kv_cache_sharing_across_beams_config": None}
    assert draft.buckets == target.buckets.model_copy(update=of_target)
    assert draft.speculative.recipe is None
    assert (recipe.draft.options, recipe.draft.roots) == (recipe.options, recipe.roots)
    assert recipe.draft.draft is None


def test_only_the_model_verifies(tmp_path: Path, write: Write) -> None:
    recipe = composed(tmp_path, write, TARGET, OWN)
    assert recipe.draft is not None
    assert recipe.spec.append_buckets == ((1, 16, 256), (2, 5, 128), (4, 5, 256))
    assert recipe.draft.spec.append_buckets == ((1, 16, 256),)
    given = composed(tmp_path, write, TARGET, OWN, "buckets.append_buckets=[[1,16,128],[2,5,64]]")
    assert given.draft is not None
    assert given.draft.spec.append_buckets == given.spec.append_buckets == ((1, 16, 128), (2, 5, 64))


def test_how_many_tokens_are_proposed(tmp_path: Path, write: Write) -> None:
    def proposed(*overrides: str) -> int | None:
        return composed(tmp_path, write, "", "", *overrides).spec.num_speculative_tokens

    assert proposed() is None
    assert proposed("speculative.recipe=small") == DEFAULT_SPECULATIVE_TOKENS
    assert proposed("speculative.recipe=small", "speculative.num_speculative_tokens=2") == 2


def test_overrides_are_of_the_model_alone(tmp_path: Path, write: Write) -> None:
    recipe = composed(tmp_path, write, TARGET, "", "quantization=fp8", "parallel.data_parallel_size=2")
    assert recipe.draft is not None
    assert recipe.draft.spec.quantization.scheme == "none"
    assert (recipe.spec.data_parallel_size, recipe.draft.spec.data_parallel_size) == (2, 1)


ARCHITECTURE: dict[str, Any] = {
    "model_type": "test",
    "architectures": ["TestForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    ("draft", "what", "valid"),
    [
        (f"model: {{architecture: {ARCHITECTURE}}}\nbuckets: {{}}\n", "max_position_embeddings=128", "1 to 128"),
        (
            "parallel: {tensor_parallel_size: 2}\n",
            "takes 2 ranks x 1 stages, but the model has 1 elements",
            "at most 1",
        ),
        ("quantization: {scheme: fp9}\n", "'fp9' is not valid", "fp8"),
    ],
)
def test_a_draft_that_cannot_be_built_for_the_model(
    tmp_path: Path, write: Write, draft: str, what: str, valid: str
) -> None:
    if "architecture" in draft:
        draft = draft.replace(
            "buckets: {}",
            "buckets: {max_seq_len_to_capture: 128, prefill_buckets: [[1, 128]],\n  decode_buckets: [[1, 128]]}",
        )
    with pytest.raises(UserError) as caught:
        composed(tmp_path, write, TARGET, draft)
    assert what in caught.value.what
    assert valid in caught.value.valid
    assert (
        "recipes/small.yaml:7" in caught.value.where or "recipes/mine.yaml:7: speculative.recipe" in caught.value.where
    )


def test_a_spec_without_a_draft_is_what_it_was() -> None:
    """`speculative` is one more section with a default, so specs made before have it as well."""
    data = load_recipe("quickstart").spec.model_dump()
    del data["speculative"]
    assert BuildSpec.model_validate(data) == load_recipe("quickstart").spec
