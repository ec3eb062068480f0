"""The three kinds of supertask, each traced to a graph: `first`, the blocks, and `last`.

    first   input_ids, position_ids             -> hidden_states and what the layers are called with (rotary tables)
    block   hidden_states, ..., KV cache, slots -> hidden_states
    last    hidden_states                       -> logits

All parameters are inputs, named as in the model's state dict (a block's relative to its layer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._pytree import tree_map

from furiosa_build.artifact.schema import Role, TensorSpec
from furiosa_build.backends.graph import dtype_name
from furiosa_build.errors import UserError
from furiosa_build.models.attention import CacheProbe, PagedCache
from furiosa_build.models.cut import CutGraph, cut
from furiosa_build.models.linear import QuantizedLinear
from furiosa_build.models.skeleton import LayerCall, Skeleton, TensorName, functional
from furiosa_build.models.tensor_parallel import Rank
from furiosa_build.plan.cuts import Cut
from furiosa_build.recipe.schema import Scheme

HIDDEN_STATES = "hidden_states"
LOGITS = "logits"


@dataclass(frozen=True)
class BucketShape:
    """Static sizes of a program: `query` new tokens of each of `batch` sequences, over a context of `context`."""

    batch: int
    query: int
    context: int

    @property
    def is_prefill(self) -> bool:
        """Whether the new tokens are the whole context."""
        return self.query == self.context


class Tracer:
    """Traces one model's supertasks.

    Args:
        hf_config: The fields of the model's config.json.
        schemes: Full parameter name -> scheme, of the quantized weights of linear layers.
        cuts: Full parameter name -> how ranks share it.
        ranks: Of a tensor-parallel group.
    """

    def __init__(
        self,
        hf_config: Mapping[str, Any],
        schemes: Mapping[str, Scheme],
        cuts: Mapping[str, Cut] | None = None,
        ranks: int = 1,
    ) -> None:
        self.skeleton = Skeleton(dict(hf_config))
        self._rank = Rank(self.skeleton, cuts or {}, ranks) if ranks > 1 else None
        _quantize_modules(self.skeleton.model, schemes)
        if self._rank is not None:
            self._rank.join()

    def layer_calls(self, shape: BucketShape) -> list[LayerCall]:
        """How each layer is called in this bucket, with fake tensors."""
        with _fake():
            ids = torch.zeros((shape.batch, shape.query), dtype=torch.int64)
            positions = torch.zeros_like(ids)
            parameters = {name: _like(p) for name, p in self.skeleton.outer_parameters().items()}
            calls: list[LayerCall] = []
            functional(parameters, self.skeleton.model, lambda: _record(self.skeleton, ids, positions, calls))
            return calls

    def first(self, shape: BucketShape, outputs: Sequence[tuple[int, str]]) -> CutGraph:
        """`outputs`: for every tensor after hidden_states, the layer and argument name it is passed to."""
        inputs = _Inputs()
        ids = inputs.add("input_ids", "activation", (shape.batch, shape.query), torch.int64)
        positions = inputs.add("position_ids", "activation", (shape.batch, shape.query), torch.int64)
        rank = None if self._rank is None else inputs.add("rank", "activation", (1,), torch.int64)
        parameters = inputs.add_parameters(self.skeleton.outer_parameters())

        def forward(*values: Tensor) -> tuple[Tensor, ...]:
            calls: list[LayerCall] = []
            with nullcontext() if self._rank is None or rank is None else self._rank.known(values[rank]):
                functional(
                    {name: values[i] for name, i in parameters.items()},
                    self.skeleton.model,
                    lambda: _record(self.skeleton, values[ids], values[positions], calls),
                )
            return calls[0].hidden_states, *(calls[layer].tensors[name] for layer, name in outputs)

        return inputs.export(forward, [HIDDEN_STATES, *(activation_name(layer, name) for layer, name in outputs)])

    def block(self, shape: BucketShape, layer: int) -> CutGraph:
        """The decoder layer `layer`."""
        module, call = self.skeleton.layers[layer], self.layer_calls(shape)[layer]
        per_slot = self.cache_shape(layer, call)
        inputs, dtype = _Inputs(), self.skeleton.dtype
        hidden = inputs.add(HIDDEN_STATES, "activation", call.hidden_states.shape, call.hidden_states.dtype)
        named = {n: inputs.add(n, "activation", t.shape, t.dtype) for n, t in call.tensors.items()}
        new = (shape.batch, shape.query)
        slots = inputs.add("slot_mapping", "activation", new, torch.int64)
        context: dict[str, int] = {}
        if not shape.is_prefill:
            size = (shape.batch, shape.context)
            context["context_slots"] = inputs.add("context_slots", "activation", size, torch.int64)
            if shape.query == 1:
                context["context_lens"] = inputs.add("context_lens", "activation", size[:1], torch.int64)
            elif "position_ids" in named:
                context["position_ids"] = named["position_ids"]
            else:
                context["position_ids"] = inputs.add("position_ids", "activation", new, torch.int64)
        keys = inputs.add("key_cache", "kv_cache", (None, *per_slot), dtype)
        values_ = inputs.add("value_cache", "kv_cache", (None, *per_slot), dtype)
        parameters = inputs.add_parameters(dict(module.named_parameters()))

        def forward(*values: Tensor) -> tuple[Tensor, ...]:
            paged = PagedCache(
                key_cache=values[keys],
                value_cache=values[values_],
                slot_mapping=values[slots],
                **{name: values[i] for name, i in context.items()},
            )
            kwargs = _fill(call.kwargs, {name: values[i] for name, i in named.items()})
            own = {name: values[i] for name, i in parameters.items()}
            return (functional(own, module, lambda: module(values[hidden], **kwargs, paged=paged)),)

        return inputs.export(forward, [HIDDEN_STATES])

    def last(self, shape: BucketShape, last_token_only: bool) -> CutGraph:
        """Logits of every position, or (`last_token_only`) of the one that `logits_indices` [batch] names."""
        inputs, config = _Inputs(), self.skeleton.config
        size = (shape.batch, shape.query, config.hidden_size)
        hidden = inputs.add(HIDDEN_STATES, "activation", size, self.skeleton.dtype)
        select = last_token_only and shape.query > 1
        indices = inputs.add("logits_indices", "activation", (shape.batch,), torch.int64) if select else None
        parameters = inputs.add_parameters(self.skeleton.outer_parameters())

        def forward(*values: Tensor) -> tuple[Tensor, ...]:
            states = values[hidden]
            if indices is not None:
                states = states[torch.arange(shape.batch), values[indices]].unsqueeze(1)
            ids = torch.zeros(states.shape[:2], dtype=torch.int64)
            own = {name: values[i] for name, i in parameters.items()}
            return (functional(own, self.skeleton.model, lambda: self.skeleton.logits(states, ids)),)

        return inputs.export(forward, [LOGITS])

    def cache_shape(self, layer: int, call: LayerCall) -> tuple[int, ...]:
        """(kv_heads, head_dim) of a layer's KV cache. Raises UserError when the layer keeps its state elsewhere."""
        probe, module = CacheProbe(), self.skeleton.layers[layer]
        with _fake(call.hidden_states):
            own = {name: _like(p) for name, p in module.named_parameters()}
            kwargs = _fill(call.kwargs, call.tensors)
            functional(own, module, lambda: module(call.hidden_states, **kwargs, paged=probe))
        if probe.shape_per_slot is None:
            raise UserError(
                f"{type(module).__name__} is not supported: layer {layer} does not attend through transformers' "
                "attention interface, so it cannot have a paged KV cache",
                where="model.architecture",
            )
        return probe.shape_per_slot


def activation_name(layer: int, name: str) -> str:
    """The pipeline's name for a tensor that is passed to `layer` as `name`."""
    return f"layers.{layer}.{name}"


class _Inputs:
    """The inputs of a graph to be: specs in calling order. `add` returns an input's position."""

    def __init__(self) -> None:
        self.specs: list[TensorSpec] = []

    def add(self, name: str, role: Role, shape: Sequence[int | None], dtype: torch.dtype) -> int:
        self.specs.append(TensorSpec(name=name, role=role, dtype=dtype_name(dtype), shape=list(shape)))
        return len(self.specs) - 1

    def add_parameters(self, parameters: Mapping[str, Tensor]) -> dict[str, int]:
        return {name: self.add(name, "parameter", p.shape, p.dtype) for name, p in sorted(parameters.items())}

    def export(self, forward: Callable[..., tuple[Tensor, ...]], outputs: Sequence[str]) -> CutGraph:
        module = _Function(forward)
        slots = Dim("slots", min=2)
        with _fake():
            examples = tuple(
                torch.empty([64 if n is None else n for n in spec.shape], dtype=getattr(torch, spec.dtype))
                for spec in self.specs
            )
        dynamic = tuple({i: slots for i, n in enumerate(spec.shape) if n is None} for spec in self.specs)
        with torch.no_grad():
            program = torch.export.export(module, examples, dynamic_shapes=(dynamic,), strict=False)
        return cut(program, self.specs, outputs)


class _Function(nn.Module):
    """A function as a module without parameters, which is what `torch.export` takes."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        # A compiled program takes its inputs' strides for granted: what one returns and the next takes is contiguous.
        return tuple(value.contiguous() for value in self._function(*values))


def _record(skeleton: Skeleton, ids: Tensor, positions: Tensor, calls: list[LayerCall]) -> Tensor:
    calls.extend(skeleton.record_layer_calls(ids, positions))
    return calls[0].hidden_states


def _fill(kwargs: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    def value(leaf: Any) -> Any:
        return tensors[leaf.name] if isinstance(leaf, TensorName) else leaf

    filled: dict[str, Any] = tree_map(value, kwargs)
    return filled


def _quantize_modules(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    for name, module in list(model.named_modules()):
        scheme = schemes.get(f"{name}.weight", "none")
        if scheme != "none":
            if not isinstance(module, nn.Linear):
                raise TypeError(f"{name} is no linear layer")
            model.set_submodule(name, QuantizedLinear(module, scheme))


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)


@contextmanager
def _fake(tensor: Tensor | None = None) -> Iterator[None]:
    """Tensors made inside are fake: shapes without memory. Joins the mode that `tensor` was made in."""
    mode = getattr(tensor, "fake_mode", None) or torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        yield
