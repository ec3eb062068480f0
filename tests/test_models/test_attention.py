from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from furiosa_build.core.errors import UserError
from furiosa_build.models.attention import CacheProbe, PagedCache, paged_attention


def test_bfloat16_stays_bfloat16() -> None:
    tensors = [torch.randn((1, 2, 3, 8)).to(torch.bfloat16) for _ in range(3)]
    caches = [torch.zeros((4, 2, 8), dtype=torch.bfloat16) for _ in range(2)]
    paged = PagedCache(*caches, torch.tensor([[1, 3, 2]]), None, None)
    output, _ = paged_attention(nn.Module(), *tensors, None, paged=paged)
    assert output.dtype == torch.bfloat16
    assert output.shape == (1, 3, 2, 8)


def test_a_probe_learns_the_shape_of_the_cache() -> None:
    probe = CacheProbe()
    query, key = torch.zeros((1, 8, 3, 16)), torch.zeros((1, 2, 3, 16))
    output, _ = paged_attention(nn.Module(), query, key, key, None, paged=probe)
    assert probe.shape_per_slot == (2, 16)
    assert output.shape == (1, 3, 8, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 50.0}, "capped attention scores"),
        ({"s_aux": torch.zeros(2)}, "attention sinks"),
        ({}, "does not pass the KV cache on"),
    ],
)
def test_what_paged_attention_does_not_do_is_refused(options: dict[str, Any], message: str) -> None:
    tensor = torch.zeros((1, 2, 3, 8))
    with pytest.raises(UserError, match=message):
        paged_attention(nn.Linear(1, 1), tensor, tensor, tensor, None, **options)


def test_keys_and_values_of_different_sizes_are_refused() -> None:
    key, value = torch.zeros((1, 2, 3, 8)), torch.zeros((1, 2, 3, 6))
    with pytest.raises(UserError, match="different sizes"):
        paged_attention(nn.Module(), key, key, value, None, paged=CacheProbe())
