"""Weights of small linear layers as schemes store them, and as programs see them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.scheme import scheme as find_scheme


def random_weight(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different sizes."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    spread = torch.exp(torch.randn((rows, 1), generator=generator))
    return (torch.randn((rows, columns), generator=generator) * spread).to(dtype)


def operands(scheme: str, stored: Mapping[str, Tensor], columns: int) -> list[Tensor]:
    """What a layer with `columns` inputs computes with, bytes of the stored parts as the runtime views them."""
    own = find_scheme(scheme)
    rows = next(part for name, part in stored.items() if name != "weight_scale").shape[0]
    dtype = str(stored["weight_scale"].dtype).removeprefix("torch.")
    layouts = own.operands(Layout(dtype, (rows, columns)))
    found = [stored[name].view(getattr(torch, layout.dtype)) for name, layout in layouts.items()]
    assert [Layout.of(operand) for operand in found] == list(layouts.values())
    return found


def sums_of_products(scheme: str, stored: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """x times the weight in float64, from the stored numbers by torch's own conversion; and of the magnitudes."""
    scale = stored["weight_scale"].double()
    if scheme == "fp8":
        weight = stored["weight"].to(torch.float64) * scale
    else:
        weight = (stored["weight_packed"].view(torch.uint8)[:, : x.shape[-1]].double() - 128) * scale
    return x.double() @ weight.T, x.double().abs() @ weight.T.abs()
