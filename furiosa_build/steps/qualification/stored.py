"""The model by transformers' modules over weights that the build reads, for those that no source has.

They are drawn, or quantized already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from furiosa_build.core.progress import advance, expect
from furiosa_build.ir.outline import Outline
from furiosa_build.quant.scheme import scheme
from furiosa_build.steps.qualification.layers import Layers
from furiosa_build.steps.qualification.nudges import Nudges
from furiosa_build.steps.qualification.reference import Asked, Expected
from furiosa_build.steps.qualification.rounding import InputRounding

if TYPE_CHECKING:
    from torch import Tensor

    from furiosa_build.weights.source import TensorSource


class StoredModel:
    """The model's logits by transformers; one layer at a time is in memory."""

    def __init__(
        self, hf_config: dict[str, Any], outline: Outline, schemes: dict[str, Any], source: TensorSource
    ) -> None:
        from furiosa_build.models.skeleton import Skeleton

        self._outline, self._schemes, self._source = outline, schemes, source
        self.dtype = outline.dtype
        skeleton = Skeleton(hf_config, attention="eager")
        self._model = skeleton.model
        self._model.set_experts_implementation("eager")  # that of tracing holds the experts' weights for each token
        self._rounding = InputRounding()
        for name, module in self._model.named_modules():
            self._rounding.add(module, scheme(schemes.get(f"{name}.weight", "none")))
        self._prefix = outline.layer_prefix
        place = self._prefix.removesuffix(".")
        self._layers = Layers(self._model, place, self._load_layer)
        self._nudges = Nudges(self._model.get_submodule(place).children())
        self._load(skeleton.outer_parameters())

    def logits(self, asked: Sequence[Asked]) -> list[Expected]:
        """The logits of several sequences."""
        return self._rounding.expected(lambda: self._run(asked))

    def nudged(self, asked: Sequence[Asked]) -> list[list[Tensor]]:
        """The same, as if the model rounded otherwise."""
        return self._nudges.runs(self._run, asked)

    def _run(self, asked: Sequence[Asked]) -> list[Tensor]:
        inside = (name for name in self._outline.parameters if name.startswith(self._prefix))
        expect(sum(scheme(self._schemes.get(n, "none")).nbytes(self._outline.parameters[n].layout) for n in inside))
        return self._layers.logits(asked)

    def _load_layer(self, number: int) -> None:
        own = f"{self._prefix}{number}."
        self._load(name for name in self._outline.parameters if name.startswith(own))

    def _load(self, names: Iterable[str]) -> None:
        """Gives the model parameters, under all the names that it has for each."""
        from torch import nn

        all_names: dict[int, list[str]] = {}
        by_name = dict(self._model.named_parameters(remove_duplicate=False))
        for name, parameter in by_name.items():
            all_names.setdefault(id(parameter), []).append(name)
        for name in names:
            loaded = nn.Parameter(self._read(name), requires_grad=False)
            for each in all_names[id(by_name[name])]:
                owner, _, leaf = each.rpartition(".")
                setattr(self._model.get_submodule(owner), leaf, loaded)

    def _read(self, name: str) -> Tensor:
        import torch

        own, layout = scheme(self._schemes.get(name, "none")), self._outline.parameters[name].layout
        advance(own.nbytes(layout))
        stored = {part: self._source.read(own.stored_name(name, part)) for part in own.parts(layout)}
        return own.dequantize(stored, getattr(torch, layout.dtype))
