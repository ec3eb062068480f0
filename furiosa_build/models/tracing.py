"""Supertasks, traced to graphs: what comes before the decoder layers, layers, what comes after, and runs of these.

    first   input_ids, position_ids             -> hidden_states and what the layers are called with (rotary tables)
    layers  hidden_states, ..., KV cache, slots -> hidden_states
    last    hidden_states                       -> logits, and last_hidden_state where it is asked for

All parameters are inputs: a layer's named relative to it, with its number in the supertask; others as in the model's
state dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from furiosa_build.backends.graph import dtype_name
from furiosa_build.core.errors import UserError
from furiosa_build.ir.kv_cache import KvCacheDtype, slot_layout
from furiosa_build.ir.segment import Segment
from furiosa_build.ir.sharding import Cut
from furiosa_build.models.attention import AttentionCall, PagedCache, attending, unattended
from furiosa_build.models.graph_inputs import GraphInputs, fake_tensors
from furiosa_build.models.own_attention import keeping
from furiosa_build.models.partition import CutGraph
from furiosa_build.models.skeleton import LayerCall, Skeleton, fill, functional
from furiosa_build.models.tensor_parallel import Rank
from furiosa_build.quant.linear import QuantizedEmbedding, QuantizedLinear, operands_of
from furiosa_build.quant.scheme import scheme

HIDDEN_STATES = "hidden_states"
LOGITS = "logits"
LAST_HIDDEN_STATE = "last_hidden_state"


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

    @property
    def is_decode(self) -> bool:
        """Whether there is one new token a sequence."""
        return self.query == 1


class Tracer:
    """Traces one model's supertasks.

    Args:
        hf_config: The fields of the model's config.json.
        schemes: Full parameter name -> scheme (`quant.scheme`), of the quantized weights of linear layers.
        cuts: Full parameter name -> how ranks share it.
        ranks: Ranks of a tensor-parallel group.
        kv_cache_dtype: What KV caches hold.
    """

    def __init__(
        self,
        hf_config: Mapping[str, Any],
        schemes: Mapping[str, str],
        cuts: Mapping[str, Cut] | None = None,
        ranks: int = 1,
        kv_cache_dtype: KvCacheDtype = "auto",
    ) -> None:
        self.skeleton, self.kv_cache_dtype = Skeleton(dict(hf_config)), kv_cache_dtype
        self.rank = Rank(self.skeleton, cuts or {}, ranks) if ranks > 1 else None
        _quantize_modules(self.skeleton.model, schemes)
        if self.rank is not None:
            self.rank.join()

    def layer_calls(self, shape: BucketShape) -> list[LayerCall]:
        """How each layer is called in this bucket, with fake tensors."""
        with fake_tensors():
            ids = torch.zeros((shape.batch, shape.query), dtype=torch.int64)
            positions = torch.zeros_like(ids)
            parameters = {name: _like(p) for name, p in self.skeleton.outer_parameters().items()}
            calls: list[LayerCall] = []
            functional(
                parameters, self.skeleton.model, lambda: _record(self.skeleton, ids, positions, shape.context, calls)
            )
            return calls

    def trace(
        self,
        shape: BucketShape,
        segment: Segment,
        last_token_only: bool = False,
        last_hidden_state: bool = False,
    ) -> CutGraph:
        """The graph of a supertask.

        Args:
            shape: The sizes of the bucket.
            segment: What the supertask computes.
            last_token_only: Prefill gives logits of one position only: the one that `logits_indices` [batch] names.
            last_hidden_state: Prefill also gives the hidden states that these logits are made of.
        """
        return _Trace(self, shape, segment, last_token_only, last_hidden_state and not shape.is_decode).export()

    def cache_shapes(self, layer: int, call: LayerCall) -> tuple[CacheShape, CacheShape]:
        """The shapes of a layer's key and value cache. `models.checks` has made sure that it attends once."""
        asked: list[tuple[Tensor, Tensor]] = []
        module = self.skeleton.layers[layer]

        def attend(attention: AttentionCall) -> Tensor:
            asked.append((attention.key, attention.value))
            return attention.unattended

        def keep(key: Tensor, value: Tensor, context: int) -> tuple[Tensor, Tensor]:
            asked.append((key, value))
            return unattended(key, context), unattended(value, context)

        with fake_tensors(call.hidden_states), attending(attend), keeping(keep):
            own = {name: _like(p) for name, p in module.named_parameters()}
            kwargs = fill(call.kwargs, call.tensors)
            functional(own, module, lambda: self.skeleton.call_layer(module, call.hidden_states, kwargs))
        key, value = asked[0]
        return (key.shape[1], key.shape[3]), (value.shape[1], value.shape[3])


CacheShape = tuple[int, int]
"""KV heads, and the numbers of each: what a cache holds of one token."""


def activation_name(layer: int, name: str) -> str:
    """The pipeline's name for a tensor that is passed to `layer` as `name`."""
    return f"layers.{layer}.{name}"


class _Trace:
    """One graph in the making: its inputs, and the function of them that is traced."""

    def __init__(
        self, tracer: Tracer, shape: BucketShape, segment: Segment, last_token_only: bool, last_hidden_state: bool
    ) -> None:
        self._tracer, self._skeleton = tracer, tracer.skeleton
        self._last_hidden_state = last_hidden_state
        self._shape, self._segment = shape, segment
        self._inputs = inputs = GraphInputs()
        self._calls = tracer.layer_calls(shape) if segment.layers else []
        # How layers are called for one token of each row.
        self._sliced_calls = tracer.layer_calls(replace(shape, query=1)) if segment.slices else []
        query = 1 if segment.is_sliced else shape.query
        ids = (shape.batch, query)
        if segment.first:
            self._ids = inputs.add("input_ids", "activation", ids, torch.int64)
            self._positions = inputs.add("position_ids", "activation", ids, torch.int64)
            self._rank = None if tracer.rank is None else inputs.add("rank", "activation", (1,), torch.int64)
        else:
            size = (*ids, self._skeleton.text_config.hidden_size)
            self._hidden = inputs.add(HIDDEN_STATES, "activation", size, self._skeleton.dtype)
            self._arguments = self._add_arguments()
        self._selects = segment.last and last_token_only and not shape.is_decode and not segment.is_sliced
        self._indices: int | None = None
        if segment.slices or self._selects:
            self._indices = inputs.add("logits_indices", "activation", (shape.batch,), torch.int64)
        if segment.layers:
            self._slots = inputs.add("slot_mapping", "activation", ids, torch.int64)
            self._context = {} if shape.is_prefill else self._add_context()
        self._caches = [self._add_cache(block, layer) for block, layer in enumerate(segment.layers)]
        outer = self._skeleton.outer_parameters() if segment.first or segment.last else {}
        self._outer = inputs.add_parameters(outer)
        self._own = [
            inputs.add_parameters(dict(self._skeleton.layers[layer].named_parameters()), block)
            for block, layer in enumerate(segment.layers)
        ]

    def export(self) -> CutGraph:
        """The graph, without the inputs that turn out to have no effect."""
        outputs = [HIDDEN_STATES, *(activation_name(layer, name) for layer, name in self._segment.outputs)]
        if self._segment.last:
            outputs = [LOGITS, LAST_HIDDEN_STATE] if self._last_hidden_state else [LOGITS]
        return self._inputs.export(self._forward, outputs)

    def _add_arguments(self) -> list[dict[str, int]]:
        """The inputs that every layer takes: argument -> number of the input."""
        added: dict[str, int] = {}
        arguments = []
        for block, layer in enumerate(self._segment.layers):
            known = self._segment.arguments[block] if self._segment.arguments else {}
            own = {}
            for argument, tensor in self._calls[layer].tensors.items():
                name = known.get(argument, argument if not self._segment.arguments else f"unused.{block}.{argument}")
                if name not in added:
                    added[name] = self._inputs.add(name, "activation", tensor.shape, tensor.dtype)
                own[argument] = added[name]
            arguments.append(own)
        return arguments

    def _add_context(self) -> dict[str, int]:
        shape, add = self._shape, self._inputs.add
        context = {"context_slots": add("context_slots", "activation", (shape.batch, shape.context), torch.int64)}
        if shape.is_decode or self._segment.slices:
            context["context_lens"] = add("context_lens", "activation", (shape.batch,), torch.int64)
        if not shape.is_decode:
            known = [i for i, spec in enumerate(self._inputs.specs) if spec.name == "position_ids"]
            new = (shape.batch, shape.query)
            context["position_ids"] = known[0] if known else add("position_ids", "activation", new, torch.int64)
        return context

    def _add_cache(self, block: int, layer: int) -> tuple[int, int]:
        key, value = self._tracer.cache_shapes(layer, self._calls[layer])
        keys, values = (self._add_slots("key_cache", key, block), self._add_slots("value_cache", value, block))
        return keys, values

    def _add_slots(self, name: str, shape: CacheShape, block: int) -> int:
        dtype, slot = slot_layout(self._tracer.kv_cache_dtype, dtype_name(self._skeleton.dtype), shape)
        return self._inputs.add(name, "kv_cache", (None, *slot), getattr(torch, dtype), block)

    def _forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        segment, calls = self._segment, self._calls
        if segment.first:
            calls = self._first(values)
            states = calls[0].hidden_states
        else:
            states = values[self._hidden]
        for block, layer in enumerate(segment.layers):
            call, tensors = calls[layer], calls[layer].tensors
            if not segment.first:
                tensors = {name: values[i] for name, i in self._arguments[block].items()}
            slices = segment.slices and block == len(segment.layers) - 1
            states = (self._sliced_layer if slices else self._layer)(values, block, states, call, tensors)
        if segment.last:
            return self._last(values, states)
        return states, *(calls[layer].tensors[name] for layer, name in segment.outputs)

    def _first(self, values: Sequence[Tensor]) -> list[LayerCall]:
        """What the layers are called with."""
        calls: list[LayerCall] = []
        rank = self._tracer.rank
        with nullcontext() if rank is None or self._rank is None else rank.known(values[self._rank]):
            functional(
                self._of(self._outer, values),
                self._skeleton.model,
                lambda: _record(self._skeleton, values[self._ids], values[self._positions], self._shape.context, calls),
            )
        return calls

    def _layer(
        self,
        values: Sequence[Tensor],
        block: int,
        states: Tensor,
        call: LayerCall,
        tensors: Mapping[str, Tensor],
        writes_only: bool = False,
    ) -> Tensor:
        keys, values_ = self._caches[block]
        paged = PagedCache(
            key_cache=values[keys],
            value_cache=values[values_],
            slot_mapping=values[self._slots],
            writes_only=writes_only,
            **{name: values[i] for name, i in self._context.items()},
        )
        return self._call(values, block, states, fill(call.kwargs, tensors), paged)

    def _sliced_layer(
        self, values: Sequence[Tensor], block: int, states: Tensor, call: LayerCall, tensors: Mapping[str, Tensor]
    ) -> Tensor:
        """The layer for one token of each row, which attends to keys and values of all.

        Those are what is alive of the layer as it is for all tokens; all that follows from them there is dropped.
        """
        self._layer(values, block, states, call, tensors, writes_only=True)
        assert self._indices is not None
        at = values[self._indices]
        one = self._sliced_calls[self._segment.layers[block]]
        sliced = {name: _at(tensor, one.tensors[name].shape, at) for name, tensor in tensors.items()}
        keys, values_ = self._caches[block]
        paged = PagedCache(
            key_cache=values[keys],
            value_cache=values[values_],
            slot_mapping=None,
            context_slots=values[self._context.get("context_slots", self._slots)],
            context_lens=values[self._context["context_lens"]] if self._context else at + 1,
        )
        states = _at(states, one.hidden_states.shape, at)
        return self._call(values, block, states, fill(one.kwargs, sliced), paged)

    def _call(
        self, values: Sequence[Tensor], block: int, states: Tensor, kwargs: Mapping[str, Any], paged: PagedCache
    ) -> Tensor:
        module = self._skeleton.layers[self._segment.layers[block]]
        own = self._of(self._own[block], values)
        with attending(paged.attend), keeping(paged.keep):
            return functional(own, module, lambda: self._skeleton.call_layer(module, states, kwargs))

    def _last(self, values: Sequence[Tensor], states: Tensor) -> tuple[Tensor, ...]:
        if self._selects and not self._segment.slices:
            assert self._indices is not None
            states = _at(states, (self._shape.batch, 1, states.shape[2]), values[self._indices])
        ids = torch.zeros(states.shape[:2], dtype=torch.int64)
        own = self._of(self._outer, values)
        found: list[Tensor] = []

        def run() -> Tensor:
            logits, hidden_states = self._skeleton.after_layers(states, ids)
            found.extend(hidden_states)
            return logits

        logits = functional(own, self._skeleton.model, run)
        if not self._last_hidden_state:
            return (logits,)
        if not found:
            name = type(self._skeleton.model).__name__
            what = f"output_last_hidden_state=True: {name} does not return its last hidden state"
            raise UserError(what, where="model.output_last_hidden_state", valid="false")
        return logits, found[0]

    @staticmethod
    def _of(inputs: Mapping[str, int], values: Sequence[Tensor]) -> dict[str, Tensor]:
        return {name: values[i] for name, i in inputs.items()}


def _record(skeleton: Skeleton, ids: Tensor, positions: Tensor, context: int, calls: list[LayerCall]) -> Tensor:
    calls.extend(skeleton.record_layer_calls(ids, positions, context))
    return calls[0].hidden_states


def _quantize_modules(model: nn.Module, schemes: Mapping[str, str]) -> None:
    """Replaces the modules that have quantized weights; those that share one share its operands."""
    weights = dict(model.named_parameters())
    quantized = {id(weights[name]): operands_of(weights[name], scheme(text)) for name, text in schemes.items()}
    for name, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if weight is None or (operands := quantized.get(id(weight))) is None:
            continue
        if isinstance(module, nn.Linear):
            model.set_submodule(name, QuantizedLinear(module, operands))
        elif type(module) is nn.Embedding:
            model.set_submodule(name, QuantizedEmbedding(module, operands))
        else:
            raise TypeError(f"{name} is neither a linear layer nor an embedding")


def _at(tensor: Tensor, size: Sequence[int], at: Tensor) -> Tensor:
    """The token `at` [batch] of each row, where `tensor` has all tokens. `size` is its size for one token."""
    if tensor.shape == tuple(size):
        return tensor
    differing = [dim for dim, (many, one) in enumerate(zip(tensor.shape, size, strict=True)) if many != one]
    if differing not in ([1], [2]) or size[differing[0]] != 1:
        raise UserError(
            f"a layer is called with a tensor of size {list(tensor.shape)}, of which no dimension is tokens",
            where="rewriting.add_prefill_last_block_slice",
            valid="false",
        )
    rows = torch.arange(at.shape[0]) if tensor.shape[0] == at.shape[0] else torch.zeros_like(at)
    if differing == [2]:  # a mask: [batch, heads, tokens, context]
        return tensor[rows, :, at].unsqueeze(2)
    return tensor[rows, at].unsqueeze(1)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype)
