from __future__ import annotations

import torch
from torch import nn

from furiosa_build.models.attention import AttentionCall, PagedCache, attending, paged_attention


def test_bfloat16_stays_bfloat16() -> None:
    query, key, value = (torch.randn((1, 2, 3, 8)).to(torch.bfloat16) for _ in range(3))
    caches = [torch.zeros((4, 2, 8), dtype=torch.bfloat16) for _ in range(2)]
    for sinks in (None, torch.randn(2).to(torch.bfloat16)):
        with attending(PagedCache(*caches, torch.tensor([[1, 3, 2]]), None, None).attend):
            output, _ = paged_attention(nn.Module(), query, key, value, None, s_aux=sinks)
        assert output.dtype == torch.bfloat16
        assert output.shape == (1, 3, 2, 8)


def test_who_attends_is_told_what_the_module_asks_for() -> None:
    asked: list[AttentionCall] = []
    query, key, value = torch.zeros((1, 8, 3, 16)), torch.zeros((1, 2, 3, 16)), torch.zeros((1, 2, 3, 4))

    def attend(call: AttentionCall) -> torch.Tensor:
        asked.append(call)
        return call.unattended

    with attending(attend):
        output, _ = paged_attention(nn.Module(), query, key, value, None, softcap=30.0, dropout=0.0, position_bias=1)
    assert output.shape == (1, 3, 8, 4)
    assert asked[0].variant == {"softcap": 30.0}
    assert asked[0].keywords == {"softcap": 30.0, "position_bias": 1}
