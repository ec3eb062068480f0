"""Paged attention, put into transformers' modules through its `AttentionInterface`.

Programs see KV slots, never blocks: a cache is [slots, heads, size], one token a slot. So neither the size nor the
number of blocks shapes a program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from furiosa_build.backends import ops
from furiosa_build.core.errors import UserError

PAGED_ATTENTION = "furiosa_paged"


@dataclass
class PagedCache:
    """The KV cache of one layer and where the tokens at hand lie in it.

    Attributes:
        key_cache: [slots, kv_heads, size], written in place.
        value_cache: As `key_cache`; the size of its heads may be another.
        slot_mapping: int64 [batch, query]: the slot of each new token; None: their keys and values are there already.
        context_slots: int64 [batch, context]: the slots of the whole context, in order, new token included; None for
            prefill, where the new tokens are the whole context.
        context_lens: int64 [batch]: how many of `context_slots` are valid. Read where there is one new token.
        position_ids: int64 [batch, query]: the place of each new token among `context_slots`. Read where there are
            several, each of which sees those up to itself.
        writes_only: Nothing attends: what the attention returns is not used.
    """

    key_cache: Tensor
    value_cache: Tensor
    slot_mapping: Tensor | None
    context_slots: Tensor | None = None
    context_lens: Tensor | None = None
    position_ids: Tensor | None = None
    writes_only: bool = False

    def attend(self, call: AttentionCall) -> Tensor:
        """Writes key and value to the cache, then attends over the context: [batch, query, heads, value size]."""
        query, key, value = call.query, call.key, call.value
        if self.writes_only:
            assert self.slot_mapping is not None
            ops.write_kv_cache(key, value, self.key_cache, self.value_cache, self.slot_mapping)
            return call.unattended
        in_cache = self.slot_mapping is None
        context = key.shape[2] if self.context_slots is None else self.context_slots.shape[1]
        output: Tensor = ops.paged_attention(
            query,
            None if in_cache else key,
            None if in_cache else value,
            self.key_cache,
            self.value_cache,
            self.slot_mapping,
            self.context_slots,
            self.context_lens,
            self.position_ids,
            call.scaling,
            # A window that hides nothing is left out, so that layers with and without one share their programs.
            call.sliding_window if call.sliding_window is not None and call.sliding_window < context else None,
            **call.variant,
        )
        return output

    def keep(self, key: Tensor, value: Tensor, context: int) -> tuple[Tensor, Tensor]:
        """Writes keys and values of new tokens to the cache; gives those of the context, for a layer's own attention.

        They are contiguous, as a cache of transformers gives them. What is beyond a sequence is there too: the layer's
        mask hides it.
        """
        if ops.has_codes(self.key_cache):
            raise UserError(
                "there is no attention over KV caches of 8-bit codes outside of transformers' attention interface",
                where="buckets.kv_cache_dtype",
                valid="auto",
            )
        if self.slot_mapping is not None:
            ops.write_kv_cache(key, value, self.key_cache, self.value_cache, self.slot_mapping)
        if self.writes_only:
            return unattended(key, context), unattended(value, context)
        if self.context_slots is None:
            return key.contiguous(), value.contiguous()
        context_keys, context_values = (
            ops.read_slots(cache, self.context_slots).contiguous() for cache in (self.key_cache, self.value_cache)
        )
        return context_keys, context_values


def unattended(states: Tensor, context: int) -> Tensor:
    """Keys or values of a context, where nobody looks at their numbers."""
    batch, heads, _, size = states.shape
    return states.new_zeros((batch, heads, context, size))


@dataclass(frozen=True)
class AttentionCall:
    """What a module asks of its attention.

    Attributes:
        module: Who asks.
        query: [batch, heads, query, size].
        key: [batch, kv_heads, query, size].
        value: [batch, kv_heads, query, value size].
        attention_mask: As transformers makes it, or None where nobody made one.
        scaling: What scores are multiplied by; None: size ** -0.5.
        sliding_window: Most tokens that a token attends to, itself included; None: all before it.
        softcap: Scores are brought within it, by its tanh; None: they are not.
        sinks: [heads]: a score of each head that takes part in the softmax and has no value; None: there is none.
        others: All other keyword arguments that the module passes.
    """

    module: torch.nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attention_mask: Tensor | None
    scaling: float | None
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None
    others: Mapping[str, Any]

    @property
    def variant(self) -> dict[str, Any]:
        """What only some models ask of their attention, as arguments of `furiosa::paged_attention`."""
        asked = {"softcap": self.softcap, "sinks": self.sinks}
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def keywords(self) -> dict[str, Any]:
        """What transformers' own attention functions are given for this beside query, key, value and mask."""
        asked = {
            "scaling": self.scaling,
            "sliding_window": self.sliding_window,
            "softcap": self.softcap,
            "s_aux": self.sinks,
        }
        return {**{name: value for name, value in asked.items() if value is not None}, **self.others}

    @property
    def unattended(self) -> Tensor:
        """A tensor like what attention returns, where nobody looks at its numbers."""
        batch, heads, tokens, _ = self.query.shape
        return self.query.new_zeros((batch, tokens, heads, self.value.shape[-1]))


Attend = Callable[[AttentionCall], Tensor]
"""Attention of the layer that runs: what it asks -> [batch, query, heads, value size]."""

_attend: ContextVar[Attend | None] = ContextVar("attend", default=None)


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Within, modules attend by `attend`."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls, by the names that it has for the arguments."""
    del dropout
    attend = _attend.get()
    if attend is None:
        raise UserError(
            f"not supported: {type(module).__name__} attends outside of the decoder layers", where="model.architecture"
        )
    call = AttentionCall(module, query, key, value, attention_mask, scaling, sliding_window, softcap, s_aux, others)
    return attend(call), None


MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""batch, head, query and key indices -> whether the query attends to the key."""

_made_masks: ContextVar[Callable[..., Tensor] | None] = ContextVar("made_masks", default=None)


@contextmanager
def masks_made_by(make: Callable[..., Tensor]) -> Iterator[None]:
    """Within, `make` makes the masks of models, by the arguments of transformers' `sdpa_mask`; else there are none."""
    token = _made_masks.set(make)
    try:
        yield
    finally:
        _made_masks.reset(token)


def _no_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    make = _made_masks.get()
    return None if make is None else make(*args, **kwargs)


AttentionInterface.register(PAGED_ATTENTION, paged_attention)
AttentionMaskInterface.register(PAGED_ATTENTION, _no_mask)
