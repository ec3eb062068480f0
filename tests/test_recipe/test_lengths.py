"""The longest sequence: 2048 by default, as far as the model goes; what was given is never changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.compose import load_recipe, recipe_roots, validate
from furiosa_build.recipe.lengths import fit_length
from furiosa_build.recipe.schema import BucketSpec, BuildSpec

from .conftest import Write

RECIPE = """\
# A recipe that says nothing of lengths.
defaults:
  - base
  - model: quickstart
  - quantization: none
"""


def spec_with(tmp_path: Path, write: Write, *overrides: str) -> BuildSpec:
    write("recipes/mine.yaml", RECIPE)
    return load_recipe("mine", overrides, cwd=tmp_path).spec


def test_what_is_not_given_is_as_long_as_the_model_takes(tmp_path: Path, write: Write) -> None:
    spec = spec_with(tmp_path, write)
    assert spec.buckets.max_seq_len_to_capture == 2048
    fitted = fit_length(spec, 1024, "the model")
    assert fitted.buckets == BucketSpec(max_seq_len_to_capture=1024)
    assert fitted.buckets.prefill_buckets == fitted.buckets.decode_buckets == ((1, 1024),)
    assert fitted.model_copy(update={"buckets": spec.buckets}) == spec, "all else stays"
    assert fit_length(fitted, 512, "another") is fitted, "now it is given"


def test_buckets_that_are_given_stay(tmp_path: Path, write: Write) -> None:
    spec = spec_with(tmp_path, write, "buckets.decode_buckets=[[4,512]]", "buckets.paged_attention_block_size=16")
    fitted = fit_length(spec, 1024, "the model").buckets
    assert (fitted.prefill_buckets, fitted.decode_buckets) == (((1, 1024),), ((4, 512),))
    assert fitted.paged_attention_block_size == 16


def test_a_length_that_is_given_stays(tmp_path: Path, write: Write) -> None:
    spec = spec_with(tmp_path, write, "buckets.max_seq_len_to_capture=2048")
    assert fit_length(spec, 1024, "the model") is spec


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("buckets.decode_buckets=[[1,2048]]", r"the bucket \[1, 2048\] is longer than max_seq_len_to_capture=1024"),
        ("scheduler.prefill_chunk_size=1500", "prefill_chunk_size=1500 is more than any prefill bucket takes"),
    ],
)
def test_what_is_given_and_too_long_is_an_error(tmp_path: Path, write: Write, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        fit_length(spec_with(tmp_path, write, override), 1024, "max_position_embeddings=1024 of the model")
    assert caught.value.where == "max_position_embeddings=1024 of the model"


def test_from_python_as_well() -> None:
    data: dict[str, Any] = {
        "name": "x",
        "model": {"model_id_or_path": "x"},
        "target": {"name": "cpu"},
        "backend": {"name": "eager"},
        "buckets": {"prefill_buckets": [], "decode_buckets": []},
    }
    spec = validate("Python", data, {}, recipe_roots()).spec
    assert fit_length(spec, 100, "the model").buckets.decode_buckets == ((1, 100),)
