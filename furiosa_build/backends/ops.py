"""The operators that a trace calls beside ATen's: what a decoder layer means, not how it is computed.

Each has a reference in plain torch, which the eager backend runs, and a fake implementation for tracing. A backend may
lower an operator to a formulation of its own (`backends.lowering`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from furiosa_build.ir import kv_cache
from furiosa_build.quant.ops import QUANTIZED_LINEAR, quantized_linear_reference

PAGED_ATTENTION = "furiosa.paged_attention.default"
WRITE_KV_CACHE = "furiosa.write_kv_cache.default"


def write_kv_cache_reference(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Writes the keys and values of new tokens to their slots. Arguments are those of `paged_attention`."""
    write_slots(key_cache, slot_mapping, key)
    write_slots(value_cache, slot_mapping, value)


def paged_attention_reference(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor | None,
    context_slots: Tensor | None,
    context_lens: Tensor | None,
    position_ids: Tensor | None,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of new tokens over their context, after their keys and values are written to the caches.

    Args:
        query: [batch, heads, query, head_dim].
        key: [batch, kv_heads, query, head_dim]; None: keys and values are in the caches already.
        value: As `key`, but its heads may be of another size.
        key_cache: [slots, kv_heads, head_dim], written in place.
        value_cache: As `key_cache`, of the size of the values. Either may have codes (`ir.kv_cache`), for backends that
            lower this operator: it does not compute with those.
        slot_mapping: int64 [batch, query]: the slot of each new token; None where `key` is.
        context_slots: int64 [batch, context]: the slots of the whole context, in order, new tokens included; None for
            prefill, where the new tokens are the whole context.
        context_lens: int64 [batch]: how many of `context_slots` are valid. Read where there is one new token.
        position_ids: int64 [batch, query]: the index of each new token among `context_slots`. Read where there are
            several, each of which attends to the tokens up to itself.
        scaling: What scores are multiplied by; None: head_dim ** -0.5.
        sliding_window: Most tokens that a token attends to, itself included; None: all before it.
        softcap: What scores are capped at: a score becomes softcap * tanh(score / softcap); None: it stays as it is.
        sinks: [heads]: for each head one more score of the softmax, of a token without a value; None: there is none.

    Returns:
        [batch, query, heads, size of the values], of the dtype of `query`.
    """
    key, value = write_and_gather(key, value, key_cache, value_cache, slot_mapping, context_slots)
    mask = attention_mask(query.shape[2], key.shape[2], context_slots, context_lens, position_ids, sliding_window)
    if softcap is not None or sinks is not None:
        return attend_by_scores(query, key, value, mask, scaling, softcap, sinks).transpose(1, 2).contiguous()
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous()


_CACHES = ("key_cache", "value_cache")
write_kv_cache = torch.library.custom_op("furiosa::write_kv_cache", write_kv_cache_reference, mutates_args=_CACHES)
paged_attention = torch.library.custom_op("furiosa::paged_attention", paged_attention_reference, mutates_args=_CACHES)


@paged_attention.register_fake
def _(
    query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor, *others: object
) -> Tensor:
    del key, value, key_cache, others
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, size_of_head(value_cache)))


def has_codes(cache: Tensor) -> bool:
    """Whether a KV cache has codes of keys or values (`ir.kv_cache`)."""
    return kv_cache.has_codes(str(cache.dtype).removeprefix("torch."))


def size_of_head(cache: Tensor) -> int:
    """How many numbers a KV cache [slots, kv_heads, row] has of a token's head."""
    return kv_cache.size_of_row(str(cache.dtype).removeprefix("torch."), cache.shape[2])


@torch.library.custom_op("furiosa::all_reduce", mutates_args=())
def all_reduce(x: Tensor) -> Tensor:
    """The sum of every rank's x. A graph is cut here: the runtime's communicator computes it."""
    raise NotImplementedError("a graph is cut here")


@all_reduce.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("furiosa::all_gather", mutates_args=())
def all_gather(x: Tensor, size: int) -> Tensor:
    """The x of all `size` ranks side by side: [..., n] -> [..., size * n]. A graph is cut here."""
    raise NotImplementedError("a graph is cut here")


@all_gather.register_fake
def _(x: Tensor, size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] * size))


REFERENCES: Mapping[str, Callable[..., object]] = {
    PAGED_ATTENTION: paged_attention_reference,
    WRITE_KV_CACHE: write_kv_cache_reference,
    QUANTIZED_LINEAR: quantized_linear_reference,
}
"""The plain torch function of each operator that a program may call, by its name in a graph."""

COLLECTIVES = {torch.ops.furiosa.all_reduce.default: "all_reduce", torch.ops.furiosa.all_gather.default: "all_gather"}
"""Operators that need the other ranks, and their names in an artifact."""


def write_slots(cache: Tensor, slots: Tensor, values: Tensor) -> None:
    """Writes `values` [batch, kv_heads, query, head_dim] to the `slots` [batch, query] of a cache."""
    rows = values.transpose(1, 2).reshape(-1, values.shape[1], values.shape[3])
    cache.index_copy_(0, slots.reshape(-1), rows)


def write_and_gather(
    key: Tensor | None,
    value: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor | None,
    context_slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Writes the keys and values of new tokens to the caches; gives those of the whole context.

    Arguments are those of `paged_attention`.
    """
    if key is not None and value is not None and slot_mapping is not None:
        write_kv_cache_reference(key, value, key_cache, value_cache, slot_mapping)
    if context_slots is not None:
        return read_slots(key_cache, context_slots), read_slots(value_cache, context_slots)
    assert key is not None
    assert value is not None
    return key, value


def read_slots(cache: Tensor, slots: Tensor) -> Tensor:
    """What lies in the `slots` [batch, context] of a cache: [batch, kv_heads, context, head_dim]."""
    return cache[slots].transpose(1, 2)


def attend_by_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention whose scores are capped, or compete with sinks, as `paged_attention` defines both.

    The softmax is computed in float32.

    Args:
        query: [batch, heads, tokens, head_dim].
        key: [batch, kv_heads, context, head_dim].
        value: [batch, kv_heads, context, size].
        mask: As `attention_mask` returns it.
        scaling: As `paged_attention` takes it; so are `softcap` and `sinks`.

    Returns:
        [batch, heads, tokens, size].
    """
    batch, heads, tokens, size = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(batch, kv_heads, -1, size)  # the heads that share a KV head, one below the other
    scores = (grouped @ key.transpose(2, 3)) * (size**-0.5 if scaling is None else scaling)
    scores = scores.reshape(batch, heads, tokens, -1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = _sliding_mask(tokens, tokens)
    scores = scores.float().masked_fill(~mask, float("-inf"))
    if sinks is not None:
        sink = sinks.float().reshape(1, heads, 1, 1).expand(batch, heads, tokens, 1)
        scores = torch.cat([scores, sink], dim=-1)
    shares = torch.softmax(scores, dim=-1)[..., : key.shape[2]].to(value.dtype)
    output = shares.reshape(batch, kv_heads, -1, key.shape[2]) @ value
    return output.reshape(batch, heads, tokens, value.shape[-1])


def attention_mask(
    tokens: int,
    context: int,
    context_slots: Tensor | None,
    context_lens: Tensor | None,
    position_ids: Tensor | None,
    window: int | None,
) -> Tensor | None:
    """Which tokens of the context each new token attends to, as `paged_attention` defines it.

    Returns: bool, of a shape that broadcasts to [batch, heads, tokens, context]; None: all up to itself.
    """
    window = None if window is None or window >= context else window
    if context_slots is None:
        return None if window is None else _sliding_mask(tokens, window)
    if tokens == 1:
        assert context_lens is not None
        return _context_mask(context, context_lens, window)
    assert position_ids is not None
    return _causal_mask(context, position_ids, window)


def _sliding_mask(length: int, window: int) -> Tensor:
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _context_mask(context: int, lens: Tensor, window: int | None) -> Tensor:
    position = torch.arange(context)[None, :]
    visible = position < lens[:, None]
    if window is not None:
        visible &= position >= lens[:, None] - window
    return visible[:, None, None, :]


def _causal_mask(context: int, positions: Tensor, window: int | None) -> Tensor:
    position = torch.arange(context)[None, None, :]
    visible = position <= positions[:, :, None]
    if window is not None:
        visible &= position > positions[:, :, None] - window
    return visible[:, None, :, :]
