"""Rules of BuildSpec that hold for all inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.compose import load_recipe
from furiosa_build.recipe.config_files import dotted, parse_key
from furiosa_build.recipe.schema import (
    BucketSpec,
    BuildOptions,
    BuildSpec,
    QuantizationSpec,
    bucket_name,
    check_architecture,
    derive_append_buckets,
)

REPOSITORY = Path(__file__).resolve().parents[2]
ARCHITECTURE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
NUMBERS = st.integers(-1, 6)


def spec_of(**changes: Any) -> BuildSpec:
    fields: dict[str, Any] = {
        "name": "x",
        "model": {"model_id_or_path": "x", "architecture": ARCHITECTURE},
        "target": {"name": "cpu"},
        "backend": {"name": "eager"},
        "buckets": {"max_seq_len_to_capture": 64},
    }
    return BuildSpec.model_validate(fields | changes)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4), st.integers(1, 6))
def test_buckets_are_accepted_if_and_only_if_sorted_unique_positive_and_within_the_limit(
    buckets: list[tuple[int, int]], limit: int
) -> None:
    valid = (
        buckets == sorted(set(buckets))
        and all(batch >= 1 and length >= 1 for batch, length in buckets)
        and all(length <= limit for _, length in buckets)
    )
    given_buckets = {"decode_buckets": [list(bucket) for bucket in buckets], "max_seq_len_to_capture": limit}
    try:
        accepted: BucketSpec | None = BucketSpec.model_validate(given_buckets)
    except ValidationError:
        accepted = None
    assert (accepted is not None) == valid
    if accepted is not None:
        assert accepted.decode_buckets == tuple(buckets)
        assert accepted.prefill_buckets == ((1, limit),)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 99)), min_size=1), st.integers(1, 32))
def test_the_blocks_that_are_needed_fill_every_decode_bucket_and_no_more(
    buckets: list[tuple[int, int]], block_size: int
) -> None:
    decode_buckets = tuple(sorted(set(buckets)))
    spec = BucketSpec(decode_buckets=decode_buckets, max_seq_len_to_capture=99, paged_attention_block_size=block_size)
    room = [spec.needed_blocks // batch * block_size - length for batch, length in decode_buckets]
    assert min(room) >= 0
    assert min(room) < block_size


@given(
    st.integers(1, 4),
    st.sampled_from(["none", "fp8", "int8"]),
    st.floats(0, 1, exclude_max=True),
    st.dictionaries(st.text(), st.integers() | st.text() | st.none() | st.lists(st.integers())),
)
def test_a_spec_comes_back_from_json_as_it_was(layers: int, scheme: str, ratio: float, extra: dict[str, Any]) -> None:
    spec = spec_of(
        model={"model_id_or_path": "x", "num_hidden_layers": layers, "architecture": extra | ARCHITECTURE},
        quantization={"scheme": scheme, "rules": [{"match": "lm_head.*", "scheme": "none"}]},
        scheduler={"spare_blocks_ratio": ratio},
    )
    assert BuildSpec.model_validate_json(spec.model_dump_json()) == spec


@given(st.lists(st.from_regex(r"[a-z_]+", fullmatch=True) | st.integers(0, 99), min_size=1))
def test_a_key_is_read_as_it_was_written(parts: list[str | int]) -> None:
    assert parse_key(dotted(tuple(parts))) == tuple(parts)


def test_a_spec_cannot_be_changed() -> None:
    spec = spec_of()
    with pytest.raises(ValidationError, match="frozen"):
        spec.name = "y"  # type: ignore[misc]


@pytest.mark.parametrize("value", [True, 1.0, "1"])
def test_nothing_is_converted_in_silence(value: object) -> None:
    with pytest.raises(ValidationError):
        BuildOptions.model_validate({"num_compile_workers": value})


def test_the_first_rule_that_matches_wins() -> None:
    rules = [
        {"match": "lm_head.weight", "scheme": "none"},
        {"match": "model.layers.[01].*", "scheme": "none"},
        {"match": "model.layers.*", "scheme": "fp8"},
    ]
    spec = QuantizationSpec.model_validate({"scheme": "fp8", "rules": rules})
    schemes = {name: spec.scheme_of(name) for name in ("lm_head.weight", "model.layers.1.a", "model.layers.2.a", "b")}
    assert schemes == {
        "lm_head.weight": "none",
        "model.layers.1.a": "none",
        "model.layers.2.a": "fp8",
        "b": "fp8",
    }


@pytest.mark.parametrize(
    ("changes", "what", "valid"),
    [
        ({"model_type": None}, "model_type=None is not valid", "a string"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' is not valid", "list"),
        ({"vocab_size": True}, "vocab_size=True is not valid", "whole number"),
        ({"num_hidden_layers": 1}, "num_hidden_layers=2 is more than the model's own 1 layers", "1 to 1"),
        ({"max_position_embeddings": 32}, "max_seq_len_to_capture=64 is more than", "1 to 32"),
    ],
)
def test_an_architecture_read_later_is_checked_the_same(changes: dict[str, Any], what: str, valid: str) -> None:
    model = {"model_id_or_path": "x", "num_hidden_layers": 2}
    spec = spec_of(model=model)
    check_architecture(spec, ARCHITECTURE, "config.json")
    with pytest.raises(UserError, match=r"config\.json") as caught:
        check_architecture(spec, ARCHITECTURE | changes, "config.json")
    assert what in caught.value.what
    assert valid in caught.value.valid
    with pytest.raises(ValidationError):
        spec_of(model=model | {"architecture": ARCHITECTURE | changes})


def test_an_architecture_that_lacks_a_size() -> None:
    lacking = {name: value for name, value in ARCHITECTURE.items() if name != "hidden_size"}
    with pytest.raises(UserError, match="has no hidden_size"):
        check_architecture(spec_of(), lacking, "config.json")


def test_a_spec_made_in_python_has_the_same_defaults_as_a_recipe() -> None:
    shipped = load_recipe("quickstart").spec
    spec = spec_of()
    assert (spec.devices, spec.parallel, spec.scheduler) == (
        shipped.devices,
        shipped.parallel,
        shipped.scheduler,
    )
    assert spec.quantization == shipped.quantization


def test_bucket_names() -> None:
    assert bucket_name("prefill", (1, 512)) == "prefill-1x512"
    assert bucket_name("append", (1, 64, 512)) == "append-1x64x512"


def test_blocks_of_beams() -> None:
    """For each of 3 searches 48 tokens of prompt, and a block for each of the 2 x 16 tokens that the beams generate."""
    shared = {"beam_width": 2, "max_new_tokens": 16}
    data = {"decode_buckets": ((1, 64), (3, 64)), "kv_cache_sharing_across_beams_config": shared}
    for block_size, prompt in ((1, 48), (16, 3), (20, 3)):
        spec = BucketSpec.model_validate({**data, "paged_attention_block_size": block_size})
        assert spec.needed_blocks == 3 * (prompt + 2 * 16)
        assert spec.compiled_decode_buckets == ((2, 64), (6, 64))


@pytest.mark.parametrize(
    ("prefill", "decode", "chunk_size", "expected"),
    [
        ([(1, 16), (1, 32), (2, 32), (1, 64)], [(1, 64), (4, 32)], None, [16, 32]),
        ([(1, 4), (1, 16), (1, 32), (1, 48)], [(1, 64)], None, [4, 48]),
        ([(1, 4), (1, 16), (1, 32), (1, 48)], [(1, 64)], 30, [4, 30]),
        ([(1, 16), (1, 32), (1, 64)], [(1, 64)], 8, [8]),  # 16 places for 8 tokens would be half padding
        ([(1, 16), (1, 32), (1, 64)], [(1, 64)], 17, [16, 17]),
        ([(1, 16), (1, 64)], [(1, 64)], 32, [16, 32]),
        ([(1, 64)], [(1, 64)], 8, [8]),
        ([(1, 64)], [(1, 64)], 64, [16]),
        ([(1, 64)], [(1, 64)], None, [16]),
        ([(1, 32), (4, 32)], [(1, 64)], None, [8]),
        ([(1, 3)], [(1, 64)], None, [1]),
        ([(1, 64)], [(1, 2), (1, 64)], None, [16]),
    ],
)
def test_derived_append_buckets(
    prefill: list[tuple[int, int]], decode: list[tuple[int, int]], chunk_size: int | None, expected: list[int]
) -> None:
    buckets = BucketSpec(
        prefill_buckets=tuple(sorted(prefill)), decode_buckets=tuple(sorted(decode)), max_seq_len_to_capture=64
    )
    assert derive_append_buckets(buckets, chunk_size) == tuple((1, new, 64) for new in expected)


@pytest.mark.parametrize(
    ("proposed", "beams", "expected"),
    [
        (4, None, [(1, 5, 32), (1, 16, 64), (4, 5, 64)]),
        (15, None, [(1, 16, 32), (1, 16, 64), (4, 16, 64)]),
        (4, {"beam_width": 3, "max_new_tokens": 8}, [(1, 16, 64), (3, 5, 32), (12, 5, 64)]),
    ],
)
def test_append_buckets_that_verify_are_as_those_of_decode(
    proposed: int, beams: dict[str, int] | None, expected: list[tuple[int, int, int]]
) -> None:
    """Besides the one for prompts."""
    buckets = BucketSpec.model_validate(
        {
            "prefill_buckets": [(1, 64)],
            "decode_buckets": [(1, 32), (4, 64)],
            "max_seq_len_to_capture": 64,
            "kv_cache_sharing_across_beams_config": beams,
        }
    )
    assert derive_append_buckets(buckets, None, proposed) == tuple(expected)


def test_the_manual_explains_every_key() -> None:
    manual = (REPOSITORY / "docs" / "recipes.md").read_text()

    def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            section = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            found += keys(field.annotation, f"{prefix}{name}.") if section else [prefix + name]  # type: ignore[arg-type]
        return found

    assert [key for key in keys(BuildSpec) + keys(BuildOptions) if f"`{key}`" not in manual] == []
