"""The forward pass of transformers' model with one decoder layer at a time in memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from furiosa_build.steps.qualification.reference import Asked

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


class _Call(NamedTuple):
    """How transformers calls a layer."""

    hidden_states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Layers:
    """The decoder layers of a model that has none of their parameters in memory.

    Args:
        model: transformers' model. All that is not in the layers it has; of the layers, parameters on the meta device.
        place: Where the layers are in it: `model.layers`.
        load: Gives the layer of a number its parameters.
    """

    def __init__(self, model: PreTrainedModel, place: str, load: Callable[[int], None]) -> None:
        from furiosa_build.models.skeleton import layers_give_tuples

        self._model, self._load = model, load
        self._layers: list[nn.Module] = list(model.get_submodule(place).children())
        self._give_tuples = layers_give_tuples(model, self._layers[0])
        self.keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def logits(self, asked: Sequence[Asked]) -> list[Tensor]:
        """The logits that are asked for, float32 [positions, vocab]: each sequence alone, and every layer loaded once.

        transformers' own `forward` runs twice for each: once for how it calls the layers, once for what comes after.
        """
        import torch

        with torch.no_grad():
            calls = [self._calls(each) for each in asked]
            hidden = [call[0].hidden_states for call in calls]
            for number in range(len(self._layers)):
                with self.loaded(number) as layer:
                    for i, call in enumerate(calls):
                        output = layer(hidden[i], *call[number].args, **call[number].kwargs)
                        hidden[i] = output if isinstance(output, torch.Tensor) else output[0]
            return [self._after(each, last) for each, last in zip(asked, hidden, strict=True)]

    @contextmanager
    def loaded(self, number: int) -> Iterator[nn.Module]:
        """A layer, with its parameters while the block lasts."""
        layer = self._layers[number]
        absent = layer.state_dict(keep_vars=True)
        self._load(number)
        try:
            yield layer
        finally:
            for name, tensor in absent.items():
                owner, _, leaf = name.rpartition(".")
                setattr(layer.get_submodule(owner), leaf, tensor)

    def __len__(self) -> int:
        return len(self._layers)

    def _calls(self, asked: Asked) -> list[_Call]:
        """How the layers are called for a sequence. What is handed from one to the next is not known yet."""
        calls: list[_Call] = []

        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            calls.append(_Call(hidden_states, args, kwargs))
            return hidden_states

        self._forward(asked, record)
        return calls

    def _after(self, asked: Asked, last: Tensor) -> Tensor:
        """The logits of a sequence whose last layer returns `last`."""
        return self._forward(asked, lambda *_, **__: last)

    def _forward(self, asked: Asked, instead: Callable[..., Tensor]) -> Tensor:
        """transformers' own forward pass, with a function in place of each layer's."""
        tokens, after = asked
        options = {"logits_to_keep": after} if self.keeps else {}
        for layer in self._layers:
            layer.forward = (lambda *args, **kwargs: (instead(*args, **kwargs), None)) if self._give_tuples else instead
        try:
            logits: Tensor = self._model(input_ids=tokens[None], use_cache=False, **options).logits[0]
        finally:
            for layer in self._layers:
                del layer.forward
        return (logits if self.keeps else logits[after]).float()
