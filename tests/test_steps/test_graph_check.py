"""What the backend has no operator for is refused when a build is planned: before anything is fetched or quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_models.tiny import LLAMA

from furiosa_build.backends.native import emit
from furiosa_build.backends.native.opaque import paged_attention
from furiosa_build.build.build import Build
from furiosa_build.core.errors import UserError

PARTS: dict[str, tuple[Any, str]] = {
    "before the layers": (torch.ops.aten.embedding.default, "what comes before the layers"),
    "a layer": (paged_attention, "layer 0"),
}


@pytest.mark.parametrize("part", PARTS)
def test_the_refusal_says_what_and_where(
    part: str, start_build: Callable[..., Build], monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, where = PARTS[part]
    lacking = {target: emission for target, emission in emit.OPERATORS.items() if target is not operator}
    monkeypatch.setattr(emit, "OPERATORS", lacking)
    build = start_build({**LLAMA, "hidden_act": "relu"}, backend="native")
    with pytest.raises(UserError) as error:
        _ = build.plan
    assert error.value.what == (
        f"backend native has no kernel for {operator}, which {where} of LlamaForCausalLM needs (prefill)"
    )
    assert (error.value.where, error.value.hint) == ("backend.name", "build with backend=inductor")
    assert start_build({**LLAMA, "hidden_act": "relu"}, backend="eager").plan.steps, "another backend has it"


def test_a_model_is_checked_once(start_build: Callable[..., Build], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "kernels" in start_build(LLAMA, backend="native").plan.steps
    monkeypatch.setattr(emit, "make_plan", None)
    assert start_build(LLAMA, backend="native", decode_buckets=[[3, 64]]).plan.steps


@pytest.mark.parametrize("model_type", ["bloom", "gptj"])
def test_layers_with_attention_of_their_own_cannot_read_codes(
    model_type: str, start_build: Callable[..., Build]
) -> None:
    config = {**LLAMA, "model_type": model_type, "rotary_dim": 8}
    assert start_build(config, backend="native").plan.steps
    with pytest.raises(UserError, match=r"no attention over KV caches of 8-bit codes .*, which layer 0 of ") as error:
        _ = start_build(config, backend="native", kv_cache_dtype="int8").plan
    assert (error.value.where, error.value.valid) == ("buckets.kv_cache_dtype", "auto")
