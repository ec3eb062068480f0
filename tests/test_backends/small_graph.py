"""A graph with what matters of a decoder layer: a product with a parameter, a KV cache written in place, a softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from furiosa_build.backends.graph import Graph
from furiosa_build.ir.tensors import TensorSpec


class Small(nn.Module):
    def forward(self, x: Tensor, cache: Tensor, slots: Tensor, weight: Tensor) -> tuple[Tensor]:
        cache.index_copy_(0, slots, x)
        scores = torch.softmax(x @ cache[slots].T, dim=-1)
        return (scores @ torch.nn.functional.silu(x @ weight.T),)


def small_graph() -> Graph:
    specs = [
        TensorSpec(name="x", role="activation", dtype="float32", shape=[4, 16]),
        TensorSpec(name="cache", role="kv_cache", dtype="float32", shape=[None, 16]),
        TensorSpec(name="slots", role="activation", dtype="int64", shape=[4]),
        TensorSpec(name="weight", role="parameter", dtype="float32", shape=[24, 16]),
    ]
    dynamic: Any = ({}, {0: Dim("slots", min=2)}, {}, {})
    program = torch.export.export(Small(), tuple(inputs()), dynamic_shapes=dynamic)
    return Graph.from_exported(program, specs, ["y"])


def inputs(slots: int = 11) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, cache, weight = (torch.randn(shape, generator=generator) for shape in ((4, 16), (slots, 16), (24, 16)))
    return [x, cache, torch.tensor([9, 2, 3, 7]), weight]
