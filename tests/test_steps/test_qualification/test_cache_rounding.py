"""Keys and values of transformers' models are rounded as a KV cache of codes does, as long as it is asked for."""

from __future__ import annotations

import pytest
import torch
from test_models.tiny import LLAMA
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from furiosa_build.ir.kv_cache import KvCacheDtype
from furiosa_build.steps.qualification.cache_rounding import CacheRounding, round_rows


@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_rows_are_rounded_by_their_largest_number(dtype: KvCacheDtype, share: float) -> None:
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0] = 0
    difference = (round_rows(x, dtype) - x).abs()
    # Half a step of int8; of e4m3, with three bits of mantissa, a 16th of each number (and of a row's least subnormal).
    largest = x.abs().amax(-1, keepdim=True)
    allowed = largest * share if dtype == "int8" else x.abs() * share + largest * 2**-10 / 448
    assert (difference <= allowed * 1.001).all()
    assert difference.max() > 0


def test_models_round_within_the_context_alone() -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**LLAMA, "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48})
    model = AutoModelForCausalLM.from_config(config).eval()

    @torch.no_grad()
    def logits() -> Tensor:
        found: Tensor = model(torch.tensor([[1, 2, 3, 4]])).logits
        return found

    before = logits()
    with CacheRounding("fp8") as rounding:
        assert not torch.equal(logits(), before)
        with rounding.left_out():
            assert torch.equal(logits(), before)
    assert torch.equal(logits(), before)
