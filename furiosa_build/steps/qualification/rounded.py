"""The source's model with its weights rounded exactly as a quantized checkpoint has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from furiosa_build.core.errors import StepError
from furiosa_build.core.progress import advance, expect
from furiosa_build.ir.outline import Outline
from furiosa_build.quant.scheme import QuantScheme, scheme
from furiosa_build.steps.qualification.original_model import OriginalModel
from furiosa_build.steps.qualification.reference import Asked, Expected
from furiosa_build.steps.qualification.rounding import InputRounding

if TYPE_CHECKING:
    from torch import Tensor, nn

    from furiosa_build.weights.source import TensorSource

LARGEST_ERROR = 0.5
"""How far a weight may be from the source's, as a share of its norm: a scheme of 4 bits loses a tenth, another weight
differs by more than all of it."""


class RoundedModel:
    """The source's model, which is changed: quantized weights are those of a checkpoint, the others stay.

    Args:
        original: The source's model.
        outline: Its parameters.
        schemes: The scheme of each quantized one, by name.
        checkpoint: What they are stored as.
        keep: Keep dequantized weights in memory, instead of making each anew whenever it is used.
    """

    def __init__(
        self,
        original: OriginalModel,
        outline: Outline,
        schemes: Mapping[str, str],
        checkpoint: TensorSource,
        keep: bool,
    ) -> None:
        self._original, self._outline, self._checkpoint, self._keep = original, outline, checkpoint, keep
        self._rounding = InputRounding()
        self.dtype = original.dtype
        expect(sum(scheme(text).nbytes(outline.parameters[name].layout) for name, text in schemes.items()))
        for name, text in schemes.items():
            self._round(name, scheme(text))

    def logits(self, asked: Sequence[Asked]) -> list[Expected]:
        """The logits of several sequences, each alone in its batch."""
        return self._rounding.expected(lambda: self._original.run(asked))

    def nudged(self, asked: Sequence[Asked]) -> list[list[Tensor]]:
        """The same, as if the model rounded otherwise."""
        return self._original.nudged(asked)

    def _round(self, name: str, own: QuantScheme) -> None:
        """Gives the layers that have a weight the dequantized one whenever they run."""
        kept: list[nn.Parameter] = []

        def rounded(original: Tensor) -> nn.Parameter:
            from torch import nn

            if kept:
                return kept[0]
            weight = nn.Parameter(self._weight(name, own, original), requires_grad=False)
            if self._keep:
                kept.append(weight)
            return weight

        module, head = self._original.weighted(name), self._original.model.get_output_embeddings()
        self._replace(module, rounded)
        if name == self._outline.head and head is not module:
            self._replace(head, rounded)
        self._rounding.add(module, own)

    def _replace(self, module: nn.Module, rounded: Callable[[Tensor], nn.Parameter]) -> None:
        originals: list[Any] = []  # one, while the layer has its dequantized weight

        def before(module: nn.Module, inputs: object) -> None:
            del inputs
            if not originals:
                originals.append(module.weight)
                module.weight = rounded(module.weight)  # type: ignore[arg-type]

        def after(module: nn.Module, inputs: object, output: object) -> None:
            del inputs, output
            module.weight = originals.pop()

        module.register_forward_pre_hook(before)
        if not self._keep:
            module.register_forward_hook(after)

    def _weight(self, name: str, own: QuantScheme, original: Tensor) -> Tensor:
        """A weight as the checkpoint has it. Raises StepError when that is not the source's, rounded."""
        import torch

        layout = self._outline.parameters[name].layout
        advance(own.nbytes(layout))
        stored = {part: self._checkpoint.read(own.stored_name(name, part)) for part in own.parts(layout)}
        weight = own.dequantize(stored, getattr(torch, layout.dtype))
        error = float((weight.float() - original.float()).norm() / original.float().norm().clamp_min(1e-12))
        if not error <= LARGEST_ERROR:
            raise StepError(
                "qualify",
                f"the quantized {name} is not that of the source: it differs by {error:.0%} of its norm, and rounding "
                f"takes at most {LARGEST_ERROR:.0%}; look at its scale, and at which tensor of the source was taken",
            )
        return weight
