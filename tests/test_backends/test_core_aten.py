"""Decomposed programs compute the same, in core ATen, and write their caches in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from furiosa_build.backends.core_aten import decompose, is_core


class Layer(torch.nn.Module):
    """Writes two caches, one of them twice, and reads them."""

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, slots: Tensor) -> Tensor:
        keys.index_copy_(0, slots, x)
        values.index_copy_(0, slots, x * 2)
        values.index_copy_(0, slots[:1], x[:1])
        return torch.nn.functional.silu(keys[slots] + values[slots]).std(dim=-1)


def example() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(3, 4), torch.randn(8, 4), torch.randn(8, 4), torch.tensor([5, 0, 2])


def test_caches_are_written_in_place() -> None:
    exported = torch.export.export(Layer(), example(), strict=False)
    decomposed = decompose(exported)
    targets = [node.target for node in decomposed.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    assert all(map(is_core, targets))
    assert targets.count(torch.ops.aten.index_put_.default) == 3
    expected, given = example(), example()
    result = Layer()(*expected)
    [found] = torch.fx.Interpreter(torch.fx.GraphModule({}, decomposed.graph)).run(*given)
    torch.testing.assert_close(found, result)
    for written, original in zip(given, expected, strict=True):
        torch.testing.assert_close(written, original, rtol=0, atol=0)


def test_what_does_not_decompose_is_told() -> None:
    class Kernel(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
            found: Tensor = torch.ops.aten._weight_int8pack_mm(x, weight, scale)
            return found

    given = torch.randn(2, 16), torch.zeros(8, 16, dtype=torch.int8), torch.ones(8)
    exported = torch.export.export(Kernel(), given, strict=False)
    with pytest.raises(ValueError, match=r"_weight_int8pack_mm\.default does not decompose"):
        decompose(exported)
