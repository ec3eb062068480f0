"""A model without weights, and its forward pass cut at the decoder layers.

Nothing here knows an architecture. transformers' own `forward` runs with its layers replaced: once by modules that
record how each layer is called (that gives what comes before the layers), once by one that injects the layers' result
(that gives what comes after).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten_with_path, tree_map, tree_map_with_path
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import build_glob_alternation

from furiosa_build.core.errors import UserError
from furiosa_build.core.python_floats import with_floats
from furiosa_build.models.attention import PAGED_ATTENTION
from furiosa_build.models.own_attention import context_cache, masks_at
from furiosa_build.models.refusals import failures_of
from furiosa_build.models.rotary import hold_rotary_tables


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
        made: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(self.config), None)
        self.has_own_attention = made is not None and has_own_attention(made)
        try:
            with torch.device("meta"):
                self.model = AutoModelForCausalLM.from_config(
                    self.config,
                    dtype=self.dtype,
                    attn_implementation=None if self.has_own_attention else attention,
                )
            _make_weights_parameters(self.model)
            _keep_in_float32(self.model, self.dtype)
            _make_buffers_real(self.model)
        except Exception as error:  # whatever transformers' code of this model says about the config
            raise UserError(
                f"transformers cannot make a causal language model of type {self.config.model_type!r}: {error}",
                where="model.architecture",
            ) from error
        self.model.eval().requires_grad_(False)
        self.rotary_limit = hold_rotary_tables(self.model)
        self._path = _path_of_layers(self.model, getattr(self.text_config, "num_hidden_layers", 0))
        owner, _, self._leaf = self._path.rpartition(".")
        self._owner = self.model.get_submodule(owner)
        self.layers = list(self.model.get_submodule(self._path).children())
        self._layers_give_tuples = layers_give_tuples(self.model, self.layers[0])

    @property
    def text_config(self) -> PreTrainedConfig:
        """The part of the config that is about the decoder."""
        return self.config.get_text_config(decoder=True)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.text_config.vocab_size)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; a config that does not tell has as many as of queries."""
        heads = getattr(self.text_config, "num_key_value_heads", None)
        return int(heads or self.text_config.num_attention_heads)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; 2048 where the config does not bound it."""
        bounds = [getattr(self.text_config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
        rotary = [] if self.rotary_limit is None else [self.rotary_limit.longest]
        return min([*(bound for bound in bounds if bound), *rotary], default=2048)

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        dtype = self.config.dtype or torch.float32
        assert isinstance(dtype, torch.dtype)
        return dtype

    def layer_prefix(self, layer: int) -> str:
        """`model.layers.3.`: what the names of a layer's parameters begin with."""
        return f"{self._path}.{layer}."

    def outer_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters outside of the decoder layers; a tied one under the first of its names."""
        inner = f"{self._path}."
        return {name: p for name, p in self.model.named_parameters() if not name.startswith(inner)}

    def record_layer_calls(self, input_ids: Tensor, position_ids: Tensor, context: int) -> list[LayerCall]:
        """Runs what comes before the layers; returns how each layer would be called, over a context of that length."""
        if not self.has_own_attention:
            return self._record(input_ids=input_ids, position_ids=position_ids)
        with masks_at(position_ids):
            cache = context_cache(len(self.layers), input_ids.shape[1], context)
            return self.record_calls_after(input_ids, position_ids, cache)

    def record_calls_after(self, input_ids: Tensor, position_ids: Tensor, cache: Cache) -> list[LayerCall]:
        """The same as transformers calls the layers after what is in its cache."""
        return self._record(input_ids=input_ids, position_ids=position_ids, past_key_values=cache, use_cache=True)

    def _record(self, **inputs: Any) -> list[LayerCall]:
        recorders = [Recorder(layer) for layer in self.layers]
        with self.layers_replaced(recorders):
            self.run(**inputs)
        return [recorder.call for recorder in recorders]

    def call_layer(self, layer: nn.Module, hidden_states: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """What a layer returns; of several values the first, which is the hidden states."""
        returned = layer(hidden_states, **kwargs)
        result: Tensor = returned[0] if self.has_own_attention and isinstance(returned, tuple | list) else returned
        return result

    def after_layers(self, hidden_states: Tensor, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Runs what comes after the layers: [batch, query, hidden] -> logits [batch, query, vocabulary].

        Then what the module with the layers returns: the last hidden state, [batch, query, hidden], as one or none.

        `input_ids` only gives the shape; what is computed from it is dead and is dropped from a trace.
        """
        first, *others = self.layers
        replacement = [_Injector(first, hidden_states), *(_Injector(layer, None) for layer in others)]
        found: list[Tensor] = []
        hook = self._owner.register_forward_hook(
            lambda _, __, output: found.append(output if isinstance(output, Tensor) else output[0])
        )
        try:
            with self.layers_replaced(replacement):
                logits = self.run(input_ids=input_ids, position_ids=torch.zeros_like(input_ids))
        finally:
            hook.remove()
        return logits, [] if self._owner is self.model else found

    def forward_with(self, layers: list[nn.Module], input_ids: Tensor, **options: Any) -> Tensor:
        """transformers' whole forward over other layers; `options` are further arguments of it."""
        with self.layers_replaced(layers):
            return self.run(input_ids=input_ids, **options)

    def run(self, use_cache: bool = False, **inputs: Any) -> Tensor:
        """transformers' whole forward; the logits."""
        logits: Tensor = self.model(**inputs, use_cache=use_cache).logits
        return logits

    @contextmanager
    def layers_replaced(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """Within, the model's decoder layers are others."""
        original = getattr(self._owner, self._leaf)
        given = [
            _AsTuple(layer) if isinstance(layer, _StandIn) and self._layers_give_tuples else layer for layer in layers
        ]
        setattr(self._owner, self._leaf, nn.ModuleList(given))
        try:
            yield
        finally:
            setattr(self._owner, self._leaf, original)


def layers_give_tuples(model: PreTrainedModel, layer: nn.Module) -> bool:
    """Whether a model takes several values from each of its layers: those with attention of their own may give it so.

    Found by running the model over fake tensors. `layer` is one of its decoder layers.
    """
    if not has_own_attention(type(model)):
        return False
    results: list[Any] = []
    hook = layer.register_forward_hook(lambda _, __, result: results.append(result))
    try:
        with failures_of(model), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            ids = torch.zeros((1, 2), dtype=torch.int64)
            parameters = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
            functional(parameters, model, lambda: model(input_ids=ids, use_cache=False).logits)
    finally:
        hook.remove()
    return isinstance(results[0], tuple | list)


def make_config(hf_config: dict[str, Any]) -> PreTrainedConfig:
    """The fields of a config.json as transformers' own class. Raises UserError for a type it does not know."""
    fields = with_floats(hf_config)
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


def fill(kwargs: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of a recorded call, with tensors in their places."""

    def value(leaf: Any) -> Any:
        return tensors[leaf.name] if isinstance(leaf, TensorName) else leaf

    filled: dict[str, Any] = tree_map(value, kwargs)
    return filled


def structure(module: nn.Module) -> str:
    """Everything but the layer's index that can make two modules of one model trace differently."""
    lines = []
    for path, part in module.named_modules():
        plain = {
            key: value
            for key, value in sorted(vars(part).items())
            if isinstance(value, str | int | float | bool | tuple | type(None)) and key != "layer_idx"
        }
        shapes = [(name, tuple(p.shape), p.dtype) for name, p in part.named_parameters(recurse=False)]
        lines.append(f"{path} {type(part).__module__}.{type(part).__qualname__} {plain} {shapes}")
    return "\n".join(lines)


class _StandIn(nn.Module):
    """Takes the place of a decoder layer. What else the model asks of the layer, the layer itself answers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_layer":
                raise
            return getattr(self._layer[0], name)


class _AsTuple(_StandIn):
    """A stand-in as a model calls it whose layers return several values."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, None]:
        return self._layer[0](*args, **kwargs), None


class Recorder(_StandIn):
    """Keeps how a layer is called. Arguments by position get the names that the layer has for them."""

    call: LayerCall

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = list(inspect.signature(self._layer[0].forward).parameters)[1:]
        self.call = LayerCall(hidden_states, *_name_tensors({**dict(zip(names, args, strict=False)), **kwargs}))
        return hidden_states


class _Injector(_StandIn):
    def __init__(self, layer: nn.Module, hidden_states: Tensor | None) -> None:
        super().__init__(layer)
        self._hidden_states = (hidden_states,)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        del args, kwargs
        [injected] = self._hidden_states
        return hidden_states if injected is None else injected


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


def has_own_attention(made: type[PreTrainedModel]) -> bool:
    """Whether transformers' code of a model knows its own attention only, and not the attention interface."""
    return not hasattr(sys.modules[made.__module__], "ALL_ATTENTION_FUNCTIONS")


def _path_of_layers(model: PreTrainedModel, count: int) -> str:
    """Where the decoder layers are: the only list of modules that is as long as the config says."""
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not re.search(r"\.\d+\.", name)
    ]
    if len(lists) != 1:
        raise UserError(
            f"not supported: {type(model).__name__} has {'several lists' if lists else 'no list'} of {count} decoder "
            "layers",
            where="model.architecture",
        )
    return str(lists[0])


def _make_weights_parameters(model: PreTrainedModel) -> None:
    """Makes parameters of the buffers that a checkpoint holds: to a program there is no difference."""
    derived = {name for name, _ in model.named_non_persistent_buffers()}
    for name, buffer in list(model.named_buffers()):
        if name not in derived:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            delattr(module, leaf)
            module.register_parameter(leaf, nn.Parameter(buffer, requires_grad=False))


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives parameters that the model's class keeps in float32 that dtype, as `from_pretrained` does."""
    if plan := model._get_dtype_plan(dtype):
        pattern, kept, _ = build_glob_alternation(list(plan))
        for name, parameter in model.named_parameters():
            if found := pattern.search(name):
                parameter.data = parameter.data.to(plan[kept[str(found.lastgroup)]])


def _make_buffers_real(model: PreTrainedModel) -> None:
    """Computes the buffers that no checkpoint holds; transformers' `_init_weights` knows how."""
    owners = {name.rpartition(".")[0] for name, _ in model.named_non_persistent_buffers()}
    for owner in sorted(owners):
        module = model.get_submodule(owner)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
        parents = [model, *(model.get_submodule(owner[: dot.start()]) for dot in re.finditer(r"\.", owner)), module]
        [*_, knows] = (parent for parent in parents if isinstance(parent, PreTrainedModel))
        knows._init_weights(module)
