"""Rotary tables that depend on the length of a sequence are those of transformers up to the length that is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from furiosa_build.ir.outline import RotaryLimit
from furiosa_build.models.skeleton import Skeleton, make_config

from .tiny import LLAMA

LONGROPE = {
    **LLAMA,
    "model_type": "phi3",
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.02 * i for i in range(8)],
        "long_factor": [1.5 + 2.5 * i for i in range(8)],
    },
}
DYNAMIC = {**LLAMA, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LONGROPE, RotaryLimit(rope_type="longrope", longest=32)),
        (DYNAMIC, RotaryLimit(rope_type="dynamic", longest=256)),
    ],
    ids=["longrope", "dynamic"],
)
def test_tables_are_held_where_they_are_constant(config: dict[str, Any], limit: RotaryLimit) -> None:
    skeleton = Skeleton(config)
    assert skeleton.rotary_limit == limit
    rotary = AutoModelForCausalLM.from_config(make_config(config)).model.rotary_emb
    x = torch.zeros(1)
    positions = torch.arange(limit.longest)[None]
    expected = rotary(x, positions)
    rotary(x, torch.tensor([[limit.longest]]))  # one token more would have changed the tables of all after it
    held = skeleton.model.model.rotary_emb
    held(x, torch.tensor([[limit.longest]]))
    for found, right in zip(held(x, positions), expected, strict=True):
        assert torch.equal(found, right)


def test_other_tables_have_no_limit() -> None:
    assert Skeleton(LLAMA).rotary_limit is None
