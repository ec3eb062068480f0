"""A model without weights, and its forward pass cut at the decoder layers.

Nothing here knows an architecture. transformers' own `forward` runs with its layers replaced: once by modules that
record how each layer is called (that gives what comes before the layers), once by one that injects the layers' result
(that gives what comes after).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_map_with_path
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from furiosa_build.core.errors import UserError
from furiosa_build.models.attention import PAGED_ATTENTION


@dataclass(frozen=True)
class LayerCall:
    """How transformers calls a decoder layer: `hidden_states` and keyword arguments, tensors inside by name.

    `tensors` maps a name such as `position_embeddings.0` to the tensor; `kwargs` has a `TensorName` in its place.
    """

    hidden_states: Tensor
    kwargs: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class TensorName:
    """Stands in a LayerCall's `kwargs` where a tensor was."""

    name: str

    def __str__(self) -> str:
        return self.name


class Skeleton:
    """A causal language model of transformers on the meta device; only small buffers (rotary frequencies) are real."""

    def __init__(self, hf_config: dict[str, Any], attention: str = PAGED_ATTENTION) -> None:
        self.config = make_config(hf_config)
        self.config._experts_implementation = "batched_mm"
        try:
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(
                    self.config, dtype=self.dtype, attn_implementation=attention
                )
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(
                f"transformers cannot make a causal language model of type {self.config.model_type!r}: {error}",
                where="model.architecture",
            ) from error
        self.model.eval().requires_grad_(False)
        derived = {name for name, _ in self.model.named_non_persistent_buffers()}
        for name, _ in self.model.named_buffers():
            if name not in derived:
                raise UserError(
                    f"{type(self.model).__name__} is not supported: it keeps weights in buffers, such as {name}",
                    where="model.architecture",
                )
        _make_buffers_real(self.model)
        self.base: PreTrainedModel = self.model.base_model
        if not isinstance(getattr(self.base, "layers", None), nn.ModuleList):
            raise UserError(
                f"{type(self.model).__name__} is not supported: it has no list of decoder layers",
                where="model.architecture",
            )
        self.layers = list(self.base.layers)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        dtype = self.config.dtype or torch.float32
        assert isinstance(dtype, torch.dtype)
        return dtype

    def layer_prefix(self, layer: int) -> str:
        """`model.layers.3.`: what the names of a layer's parameters begin with."""
        return f"{self.model.base_model_prefix}.layers.{layer}."

    def outer_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters outside of the decoder layers; a tied one under the first of its names."""
        inner = f"{self.model.base_model_prefix}.layers."
        return {name: p for name, p in self.model.named_parameters() if not name.startswith(inner)}

    def record_layer_calls(self, input_ids: Tensor, position_ids: Tensor) -> list[LayerCall]:
        """Runs what comes before the layers; returns how each layer would be called."""
        recorders = [_Recorder() for _ in self.layers]
        with self._layers_replaced(recorders):
            self._run(input_ids=input_ids, position_ids=position_ids)
        return [LayerCall(recorder.hidden_states, *_name_tensors(recorder.kwargs)) for recorder in recorders]

    def after_layers(self, hidden_states: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Runs what comes after the layers: [batch, query, hidden] -> logits [batch, query, vocabulary].

        Then the last hidden state that these are made of, [batch, query, hidden]: what the base model returns.

        `input_ids` only gives the shape; what is computed from it is dead and is dropped from a trace.
        """
        replacement = [_Injector(hidden_states), *(_Injector(None) for _ in self.layers[1:])]
        found: list[Tensor] = []
        hook = self.base.register_forward_hook(lambda _, __, output: found.append(output[0]))
        try:
            with self._layers_replaced(replacement):
                logits = self._run(input_ids=input_ids, position_ids=torch.zeros_like(input_ids))
        finally:
            hook.remove()
        return logits, found[0]

    def forward_with(self, layers: list[nn.Module], input_ids: Tensor) -> Tensor:
        """transformers' whole forward over other layers."""
        with self._layers_replaced(layers):
            return self._run(input_ids=input_ids)

    def _run(self, **inputs: Tensor) -> Tensor:
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits

    @contextmanager
    def _layers_replaced(self, layers: list[Any]) -> Iterator[None]:
        original = self.base.layers
        self.base.layers = nn.ModuleList(layers)
        try:
            yield
        finally:
            self.base.layers = original


def make_config(hf_config: dict[str, Any]) -> PreTrainedConfig:
    """The fields of a config.json as transformers' own class. Raises UserError for a type it does not know."""
    fields = dict(hf_config)
    model_type = fields.pop("model_type", None)
    fields.pop("quantization_config", None)
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"unsupported architecture: model_type {model_type!r} is not one that transformers knows",
            where="config.json, model_type",
            valid="a causal language model of the installed transformers",
        ) from error


def functional(parameters: dict[str, Tensor], module: nn.Module, call: Callable[[], Tensor]) -> Tensor:
    """Runs `call` while `module` has `parameters` (by full name) in place of its own."""
    with torch.nn.utils.stateless._reparametrize_module(module, parameters, tie_weights=True):
        return call()


class _Recorder(nn.Module):
    hidden_states: Tensor
    kwargs: dict[str, Any]

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.hidden_states, self.kwargs = hidden_states, kwargs
        return hidden_states


class _Injector(nn.Module):
    def __init__(self, hidden_states: Tensor | None) -> None:
        super().__init__()
        self._hidden_states = hidden_states

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        del kwargs
        return hidden_states if self._hidden_states is None else self._hidden_states


def _name_tensors(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors = {}
    for path, value in tree_flatten_with_path(kwargs)[0]:
        if isinstance(value, Tensor):
            tensors[_path_name(path)] = value
    named = tree_map_with_path(
        lambda path, value: TensorName(_path_name(path)) if isinstance(value, Tensor) else value, kwargs
    )
    return named, tensors


def _path_name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def _make_buffers_real(model: PreTrainedModel) -> None:
    """Computes the buffers that no checkpoint holds; transformers' `_init_weights` knows how."""
    owners = {name.rpartition(".")[0] for name, _ in model.named_non_persistent_buffers()}
    for owner in sorted(owners):
        module = model.get_submodule(owner)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        model._init_weights(module)
