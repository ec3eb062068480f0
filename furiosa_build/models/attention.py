"""Paged attention, put into transformers' modules through its `AttentionInterface`.

Programs see KV slots, never blocks: a cache is [slots, heads, head_dim], one token a slot. So neither the size nor the
number of blocks shapes a program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from furiosa_build.backends import ops
from furiosa_build.core.errors import UserError

PAGED_ATTENTION = "furiosa_paged"

_UNSUPPORTED = {"softcap": "capped attention scores", "s_aux": "attention sinks"}


@dataclass
class PagedCache:
    """The KV cache of one layer and where the tokens at hand lie in it.

    Attributes:
        key_cache: [slots, kv_heads, head_dim], written in place.
        value_cache: As `key_cache`.
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


@dataclass
class CacheProbe:
    """Stands in for a cache where only its shape is asked for. `shape_per_slot` is (kv_heads, head_dim)."""

    shape_per_slot: tuple[int, ...] | None = None


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    paged: PagedCache | CacheProbe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Writes key and value to the cache, then attends over the context.

    Shapes: query [batch, heads, query, head_dim], key and value [batch, kv_heads, query, head_dim]; returns
    [batch, query, heads, head_dim]. `sliding_window` counts the token itself, as transformers counts it.
    """
    del attention_mask, dropout
    for name, meaning in _UNSUPPORTED.items():
        if kwargs.get(name) is not None:
            raise UserError(f"{type(module).__name__} uses {meaning}, which paged attention does not have yet")
    if isinstance(paged, CacheProbe):
        if key.shape[-1] != value.shape[-1]:
            raise UserError(f"{type(module).__name__}: keys and values of different sizes are not supported yet")
        paged.shape_per_slot = (key.shape[1], key.shape[3])
        return query.transpose(1, 2), None
    if paged is None:
        raise UserError(f"{type(module).__name__} does not pass the KV cache on to its attention")

    if paged.writes_only:
        assert paged.slot_mapping is not None
        ops.write_kv_cache(key, value, paged.key_cache, paged.value_cache, paged.slot_mapping)
        return query.transpose(1, 2), None
    in_cache = paged.slot_mapping is None
    context = key.shape[2] if paged.context_slots is None else paged.context_slots.shape[1]
    if sliding_window is not None and sliding_window >= context:
        sliding_window = None  # it hides nothing, so layers with and without one share their programs
    output: Tensor = ops.paged_attention(
        query,
        None if in_cache else key,
        None if in_cache else value,
        paged.key_cache,
        paged.value_cache,
        paged.slot_mapping,
        paged.context_slots,
        paged.context_lens,
        paged.position_ids,
        scaling,
        sliding_window,
    )
    return output, None


AttentionInterface.register(PAGED_ATTENTION, paged_attention)
