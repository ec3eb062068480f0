"""Linear layers with quantized weights, as a trace sees them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.ops import quantized_linear
from furiosa_build.quant.scheme import QuantScheme


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored by a scheme.

    Its parameters are the scheme's operands, and `bias` [out] if the original has one. They have no memory.
    """

    def __init__(self, original: nn.Linear, scheme: QuantScheme) -> None:
        super().__init__()
        self._scheme = scheme
        operands = scheme.operands(Layout.of(original.weight))
        for name, layout in operands.items():
            empty = torch.empty(layout.shape, dtype=getattr(torch, layout.dtype), device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self._operands = tuple(operands)
        self.bias = original.bias
        self.largest_of_all: Callable[[Tensor], Tensor] | None = None
        """Where the input is a rank's share: from the largest numbers of its tokens [..., 1] to those of all shares."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out], in the dtype of x."""
        largest = None
        if self._scheme.rounds_activations and self.largest_of_all is not None:
            largest = self.largest_of_all(x.abs().amax(-1, keepdim=True))
        operands = [getattr(self, name) for name in self._operands]
        y: Tensor = quantized_linear(x, operands, largest, self._scheme.text)
        return y if self.bias is None else y + self.bias
