"""Rounds the inputs of linear layers as quantized layers do, and can leave it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from furiosa_build.quant.scheme import QuantScheme
from furiosa_build.steps.qualification.reference import Expected

if TYPE_CHECKING:
    from torch import Tensor, nn


class InputRounding:
    """What rounds the inputs of a model's layers."""

    def __init__(self) -> None:
        self._is_on, self._is_needed = True, False

    def add(self, module: nn.Module, own: QuantScheme) -> None:
        """Has the input of a linear layer rounded as its scheme does, token by token, if that does."""
        if not own.rounds_activations:
            return
        self._is_needed = True

        def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            del module
            (x,) = inputs
            return (own.round(x, x.abs().amax(dim=-1, keepdim=True)),) if self._is_on else None

        module.register_forward_pre_hook(before)

    def expected(self, run: Callable[[], list[Tensor]]) -> list[Expected]:
        """What `run` gives, with rounding and without."""
        found = run()
        if not self._is_needed:
            return [Expected(logits, logits) for logits in found]
        self._is_on = False
        try:
            return [Expected(*both) for both in zip(found, run(), strict=True)]
        finally:
            self._is_on = True
