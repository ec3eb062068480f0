"""Calls for `furiosa::paged_attention` and `furiosa::write_kv_cache`: arguments are those of `backends.ops`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from furiosa_build.backends.native.builder import Builder
    from furiosa_build.backends.native.values import Value

_FEW_TOKENS = 16
"""Up to this many new tokens, attention takes as long as reading the context: it is divided among threads."""
_CHUNK = 128
"""Tokens of the context that are read at a time. Its bounds do not depend on a program's shapes: nor do results."""


def emit_write_kv_cache(
    builder: Builder, key: Value, value: Value, key_cache: Value, value_cache: Value, slot_mapping: Value
) -> None:
    """The keys and values of new tokens, written to their slots."""
    key, value = (_rows(builder, tokens, cache) for tokens, cache in ((key, key_cache), (value, value_cache)))
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
    """The cache is written, where there are new keys and values; then `out`, [batch, query, heads, size of values]."""
    if key is not None and value is not None and slot_mapping is not None:
        emit_write_kv_cache(builder, key, value, key_cache, value_cache, slot_mapping)
    query = _rows(builder, query)
    operands: list[Value | None] = [None, None, key_cache, value_cache]
    if context_slots is None:  # prefill: the new tokens are the whole context, and nothing is read from the caches
        assert key is not None
        assert value is not None
        operands = [_rows(builder, key), _rows(builder, value), None, None]
    floats = [query.shape[-1] ** -0.5 if scaling is None else scaling, softcap or 0.0]
    operands += [context_slots, context_lens, position_ids]
    if context_slots is None or query.shape[2] > _FEW_TOKENS:
        builder.call("paged_attention", [query, *operands, sinks, out, None], [sliding_window or 0, 0], floats)
        return
    batch, heads, tokens, _ = query.shape
    chunks = -(-context_slots.shape[1] // _CHUNK)
    partial = builder.new((batch, chunks, tokens, heads, out.shape[-1] + 2), "float32")
    builder.call("paged_attention", [query, *operands, None, None, partial], [sliding_window or 0, _CHUNK], floats)
    builder.call("join_attention", [partial, sinks, out])


def _rows(builder: Builder, value: Value, like: Value | None = None) -> Value:
    """The value with rows that are contiguous, and of the dtype of `like`."""
    dtype = value.dtype if like is None else like.dtype
    if value.dtype == dtype and (value.stride[-1] == 1 or value.shape[-1] == 1):
        return value
    copy = builder.new(value.shape, dtype)
    builder.call("copy", [value, copy])
    return copy
