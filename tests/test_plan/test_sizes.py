"""Bytes of parameters and KV caches, counted by hand for a small model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furiosa_build.ir.kv_cache import KvCacheDtype
from furiosa_build.ir.outline import ParameterOutline
from furiosa_build.plan.budget.sizes import kv_slot_bytes, parameter_bytes, stored_bytes

from .outlines import kv_cache_bytes, model_plan, outline, plan, spec

# Of the model in outlines.py. float32: embedding and head of 100 x 8, a norm of 8.
OUTSIDE = 2 * 100 * 8 * 4 + 8 * 4


@pytest.mark.parametrize(
    ("scheme", "layer"),
    [
        ("none", (8 + 8 * 8 + 8 * 16) * 4),
        ("fp8", 8 * 4 + (8 * 8 + 8 * 4) + (8 * 16 + 8 * 4)),  # a byte a weight, a scale a row
        ("int8", 8 * 4 + (8 * 8 + 8 * 4 + 16) + (8 * 16 + 8 * 4 + 16)),  # and the shape, two int64
    ],
)
def test_parameters(scheme: str, layer: int) -> None:
    assert parameter_bytes(model_plan(spec(quantization={"scheme": scheme}))) == OUTSIDE + 3 * layer


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("none", 5 * 6 * 2),
        ("fp8", 5 * 6 + 5 * 2),
        ("int8", 5 * 8 + 5 * 2 + 16),
        ("int8-plain", 5 * 6 + 5 * 2),
        ("fp8-tensor-dynamic", 5 * 6 + 2),
        ("int8-tensor", 5 * 8 + 2 + 16),
    ],
)
def test_rows_of_packed_int8_are_filled_up_to_whole_int32(form: str, expected: int) -> None:
    assert stored_bytes(ParameterOutline(dtype="bfloat16", shape=[5, 6], linear=True), form) == expected


def test_kv_cache() -> None:
    buckets = {"paged_attention_num_blocks": 64, "paged_attention_block_size": 16}
    found = plan(spec(buckets=buckets))
    assert (
        kv_slot_bytes(found.model.outline, range(3), 1) == 3 * 2 * (2 * 4) * 4
    )  # layers, keys and values, heads, float32
    assert kv_cache_bytes(found) == (64 + 1) * 16 * kv_slot_bytes(found.model.outline, range(3), 1), (
        "a block for padding"
    )
    assert kv_slot_bytes(found.model.outline, [1], 4) == 2 * (1 * 4) * 4, "ranks share a head where there are too few"


@pytest.mark.parametrize("asked", ["int8", "fp8"])
def test_kv_cache_of_codes_has_a_byte_a_number_and_a_scale_a_head(asked: KvCacheDtype) -> None:
    assert kv_slot_bytes(outline(), range(3), 1, asked) == 3 * 2 * 2 * (4 + 4)


def test_values_may_be_smaller_than_keys() -> None:
    [block] = outline().blocks
    smaller = outline().model_copy(update={"blocks": [block.model_copy(update={"value_size": 3})]})
    assert kv_slot_bytes(smaller, range(3), 1) == 3 * (2 * 4 + 2 * 3) * 4


def test_all_kinds_of_layers_have_a_kv_cache() -> None:
    mixed, alike = (kv_cache_bytes(plan(model=outline(layers=4, sliding=sliding))) for sliding in ((0, 2), ()))
    assert mixed == alike > 0


@given(st.integers(1, 12), st.sampled_from(["none", "fp8", "int8"]))
def test_a_layer_more_is_as_many_bytes_more(layers: int, scheme: str) -> None:
    of = spec(quantization={"scheme": scheme})
    plans = [plan(of, outline(layers=layers + more)) for more in (0, 1, 2)]
    for count in (lambda of: parameter_bytes(of.model), kv_cache_bytes):
        fewest, one_more, two_more = map(count, plans)
        assert two_more - one_more == one_more - fewest > 0
