"""The model by transformers' modules over weights that the build reads: one layer in memory at a time.

For weights that no source has (drawn, or quantized already), and where the model does not fit into memory.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from furiosa_build.core.progress import advance, expect
from furiosa_build.ir.outline import Outline
from furiosa_build.quant.scheme import QuantScheme, scheme
from furiosa_build.steps.qualification.reference import Asked, Expected

if TYPE_CHECKING:
    from torch import Tensor, nn

    from furiosa_build.weights.source import TensorSource


class LayeredReference:
    """The model's logits by transformers, a layer at a time."""

    def __init__(
        self, hf_config: dict[str, Any], outline: Outline, schemes: dict[str, Any], source: TensorSource
    ) -> None:
        from furiosa_build.models.skeleton import Skeleton

        self._skeleton = Skeleton(hf_config, attention="eager")
        self._outline, self._schemes, self._source = outline, schemes, source
        self.dtype = outline.dtype
        self._rounds = False
        for name, module in self._skeleton.model.named_modules():
            own = scheme(schemes.get(f"{name}.weight", "none"))
            if own.rounds_activations:
                module.register_forward_pre_hook(_round_half_of_input(own))
                self._rounds = True

    def logits(self, asked: Sequence[Asked]) -> list[Expected]:
        """The logits of several sequences.

        All in one pass, so that every layer is read once; what is padded comes last, where no token attends to it.
        """
        import torch

        from furiosa_build.models.skeleton import functional

        skeleton = self._skeleton
        expect(
            sum(
                scheme(self._schemes.get(name, "none")).nbytes(parameter.layout)
                for name, parameter in self._outline.parameters.items()
            )
        )
        sequences = [each.tokens for each in asked]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).repeat(2 if self._rounds else 1, 1)
        outer = {name: self._read(name) for name in skeleton.outer_parameters()}
        layers = [self._streamed(layer) for layer in range(len(skeleton.layers))]
        wanted, options = torch.arange(ids.shape[1]), {}
        if "logits_to_keep" in inspect.signature(skeleton.model.forward).parameters:
            wanted = torch.unique(torch.cat([each.after for each in asked]))
            options = {"logits_to_keep": wanted}
        with torch.no_grad():
            logits = functional(outer, skeleton.model, lambda: skeleton.forward_with(layers, ids, **options))
        unrounded = logits[-len(sequences) :]
        places = [torch.searchsorted(wanted, each.after) for each in asked]
        return [
            Expected(row[place].float(), other[place].float())
            for row, other, place in zip(logits, unrounded, places, strict=False)
        ]

    def _streamed(self, layer: int) -> nn.Module:
        from torch import nn

        from furiosa_build.models.skeleton import functional

        module, prefix = self._skeleton.layers[layer], self._skeleton.layer_prefix(layer)

        class Streamed(nn.Module):
            def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
                parameters = {name: read(prefix + name) for name, _ in module.named_parameters()}
                return functional(parameters, module, lambda: module(hidden_states, **kwargs))

            def __init__(self) -> None:
                super().__init__()
                self.attention_type = getattr(module, "attention_type", None)

        read = self._read
        return Streamed()

    def _read(self, name: str) -> Tensor:
        import torch

        own, layout = scheme(self._schemes.get(name, "none")), self._outline.parameters[name].layout
        advance(own.nbytes(layout))
        stored = {part: self._source.read(own.stored_name(name, part)) for part in own.parts(layout)}
        return own.dequantize(stored, getattr(torch, layout.dtype))


def _round_half_of_input(own: QuantScheme) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that rounds the first half of a layer's input, token by token."""
    import torch

    def round_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        x, unrounded = inputs[0].chunk(2)
        return (torch.cat([own.round(x, x.abs().amax(dim=-1, keepdim=True)), unrounded]),)

    return round_input
