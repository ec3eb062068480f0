"""Layers with quantized weights, as a trace sees them: linear ones, and embeddings that are tied to one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.ops import quantized_linear
from furiosa_build.quant.scheme import QuantScheme


class Operands(NamedTuple):
    """A weight as its scheme stores it: the scheme's operands by name, as parameters without memory."""

    scheme: QuantScheme
    parameters: dict[str, nn.Parameter]

    def register(self, module: nn.Module) -> None:
        """Makes them parameters of a module."""
        for name, parameter in self.parameters.items():
            module.register_parameter(name, parameter)

    def of(self, module: nn.Module) -> list[Tensor]:
        """Those that a module has in their places just now."""
        return [getattr(module, name) for name in self.parameters]


def operands_of(weight: Tensor, scheme: QuantScheme) -> Operands:
    """The operands of a weight."""
    made = {
        name: torch.empty(layout.shape, dtype=getattr(torch, layout.dtype), device="meta")
        for name, layout in scheme.operands(Layout.of(weight)).items()
    }
    return Operands(scheme, {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in made.items()})


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored by a scheme.

    Its parameters are the scheme's operands, and `bias` [out] if the original has one.
    """

    def __init__(self, original: nn.Linear, operands: Operands) -> None:
        super().__init__()
        self._scheme, self._operands = operands.scheme, operands
        operands.register(self)
        self.bias = original.bias
        self.largest_of_all: Callable[[Tensor], Tensor] | None = None
        """Where the input is a rank's share: from the largest numbers of its tokens [..., 1] to those of all shares."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out], in the dtype of x."""
        largest = None
        if self._scheme.rounds_activations and self.largest_of_all is not None:
            largest = self.largest_of_all(x.abs().amax(-1, keepdim=True))
        y: Tensor = quantized_linear(x, self._operands.of(self), largest, self._scheme.text)
        return y if self.bias is None else y + self.bias


class QuantizedEmbedding(nn.Module):
    """An embedding whose weight is stored by a scheme: rows are dequantized as they are looked up."""

    def __init__(self, original: nn.Embedding, operands: Operands) -> None:
        super().__init__()
        self._size, self._operands = original.embedding_dim, operands
        operands.register(self)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: [...] -> [..., size], in the dtype of the model."""
        return self._operands.scheme.rows(ids, self._operands.of(self), self._size)
