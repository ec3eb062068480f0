"""Mixtures of experts in 16 bits, whose routers are undecided here and there."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from grid import grid
from safetensors.torch import load_file, save_file
from test_models.tiny import save_random_model
from test_weights.test_loading import MIXTURES

from ..test_qualify import SMALL, SOURCE, StartBuild, judge, qualify_of, refusal


@pytest.mark.parametrize(
    ("name", "dtype"), grid(product(MIXTURES, ["bfloat16", "float16"]), [("qwen3_moe", "bfloat16")])
)
def test_a_mixture_in_16_bits_qualifies(
    name: str, dtype: str, start_build: StartBuild, output: Path, tmp_path: Path
) -> None:
    model = save_random_model({**MIXTURES[name], "dtype": dtype}, tmp_path / "model", getattr(torch, dtype))
    found = judge(qualify_of(start_build(model, **SMALL)), output)
    assert found["top1_agreement"] > 0.9
    assert found["tokens_by_other_rounding"] < found["tokens"] / 10, "few choices are that even"


def test_a_mixture_with_two_experts_swapped_does_not(start_build: StartBuild, output: Path, tmp_path: Path) -> None:
    model = save_random_model({**MIXTURES["qwen3_moe"], "dtype": "bfloat16"}, tmp_path / "model", torch.bfloat16)
    of = qualify_of(start_build(model, **SMALL))
    weights = load_file(model / "model.safetensors")
    one, other = (f"model.layers.1.mlp.experts.{i}.down_proj.weight" for i in (0, 3))
    weights[one], weights[other] = weights[other], weights[one]
    save_file(weights, tmp_path / "other.safetensors", {"format": "pt"})
    why = refusal(of.with_files({SOURCE: tmp_path / "other.safetensors"}), output)
    assert "the artifact's logits are not the model's" in why
    assert "model.layers.1.mlp.experts.down_proj is another tensor by transformers" in why
