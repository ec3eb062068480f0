"""Calls for `furiosa::paged_attention` and `furiosa::write_kv_cache`: arguments are those of `backends.ops`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from furiosa_build.backends.native.builder import refusal
from furiosa_build.ir.dtypes import ITEMSIZE

if TYPE_CHECKING:
    from furiosa_build.backends.native.builder import Builder
    from furiosa_build.backends.native.values import Value

_FEW_TOKENS = 16
"""Up to this many new tokens, attention takes as long as reading the context: it is divided among threads."""
_CHUNK = 256
"""Tokens of the context that are read at a time. Its bounds do not depend on a program's shapes: nor do results."""


def emit_write_kv_cache(
    builder: Builder, key: Value, value: Value, key_cache: Value, value_cache: Value, slot_mapping: Value
) -> None:
    """The keys and values of new tokens, written to their slots. Raises UserError for keys that do not fill words."""
    if key_cache.shape[-1] * ITEMSIZE[key_cache.dtype] % 4:
        raise refusal(f"attention with heads of {key.shape[-1]} numbers over KV caches of {key_cache.dtype}")
    new = ((key, key_cache), (value, value_cache))
    key, value = (_rows(builder, x, None if cache.dtype in ("int8", "uint8") else cache) for x, cache in new)
    builder.call("write_kv_cache", [key, value, key_cache, value_cache, slot_mapping])


def emit_paged_attention(
    builder: Builder,
    out: Value,
    query: Value,
    key: Value | None,
    value: Value | None,
    key_cache: Value,
    value_cache: Value,
    slot_mapping: Value | None,
    context_slots: Value | None,
    context_lens: Value | None,
    position_ids: Value | None,
    scaling: float | None,
    sliding_window: int | None,
    softcap: float | None = None,
    sinks: Value | None = None,
) -> None:
    """The cache is written, where there are new keys and values; then `out`, [batch, query, heads, size of values].

    All keys and values are read from the caches, in prefill too: there they lie as they are multiplied.
    """
    if key is not None and value is not None and slot_mapping is not None:
        emit_write_kv_cache(builder, key, value, key_cache, value_cache, slot_mapping)
    query = _rows(builder, query)
    batch, heads, tokens, size = query.shape
    lens, positions = (context_lens, None) if tokens == 1 else (None, position_ids)
    if context_slots is None:  # prefill: the new tokens are the whole context
        context_slots, lens, positions = slot_mapping, None, None
    assert context_slots is not None
    operands = [query, key_cache, value_cache, context_slots, lens, positions]
    floats = [size**-0.5 if scaling is None else scaling, softcap or 0.0]
    if tokens > _FEW_TOKENS:
        builder.call("paged_attention", [*operands, sinks, out, None], [sliding_window or 0, 0], floats)
        return
    chunks = -(-context_slots.shape[1] // _CHUNK)
    partial = builder.new((batch, chunks, tokens, heads, out.shape[-1] + 2), "float32")
    builder.call("paged_attention", [*operands, None, None, partial], [sliding_window or 0, _CHUNK], floats)
    builder.call("join_attention", [partial, sinks, out])


def _rows(builder: Builder, value: Value, like: Value | None = None) -> Value:
    """The value with rows that are contiguous, and of the dtype of `like`."""
    dtype = value.dtype if like is None else like.dtype
    if value.dtype == dtype and (value.stride[-1] == 1 or value.shape[-1] == 1):
        return value
    copy = builder.new(value.shape, dtype)
    builder.call("copy", [value, copy])
    return copy
