"""What has to hold of the operands of the operators of KV caches and attention: see `check_calls`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from furiosa_build.backends.native.check_operands import (
    Operands,
    present,
    require,
    require_computed,
    require_dense_last,
    require_given,
    require_integer,
    require_numbers,
    require_shape,
)
from furiosa_build.backends.native.plan import Call, View


def _write_kv_cache(operands: Operands, call: Call) -> list[View]:
    require_given(operands, ".....")
    require_numbers(call, 0)
    key, value, key_cache, value_cache, slots = present(operands)
    require_integer(slots)
    for new, cache in ((key, key_cache), (value, value_cache)):
        require(len(new.shape) == 4 and len(cache.shape) == 3 and cache.shape[0] == 0, "a cache is not one")
        require(new.shape[1] == cache.shape[1] and new.shape[3] == cache.shape[2], "a cache is of other heads")
        require([new.shape[0], new.shape[2]] == slots.shape, "there is not a slot for each token")
        require_computed(new)
        require(new.dtype == cache.dtype, "a cache is of another dtype")
        require_dense_last(new)
    return [key_cache, value_cache]


def _read_kv_cache(operands: Operands, call: Call) -> list[View]:
    require_given(operands, "...")
    require_numbers(call, 0)
    cache, slots, out = present(operands)
    require_integer(slots)
    require(len(cache.shape) == 3 and len(slots.shape) == 2, "its cache or slots are not such")
    require_shape(out, *slots.shape, *cache.shape[1:])
    require(out.dtype == cache.dtype, "dtypes differ")
    require_dense_last(out)
    return [out]


def _paged_attention(operands: Operands, call: Call) -> list[View]:
    require_given(operands, ".??????????")
    require_numbers(call, 2, 2)
    query, key, value, key_cache, value_cache, slots, lens, positions, sinks, out, partial = operands
    assert query is not None
    require_computed(query, key, value, key_cache, value_cache, sinks, out)
    require_integer(slots, lens, positions)
    require_dense_last(query, key, value, sinks, out, partial, slots, lens, positions)
    require(len(query.shape) == 4, "the query has not four dimensions")
    batch, heads, tokens, size = query.shape
    if slots is None:
        require(key is not None and value is not None and key_cache is None and value_cache is None, "nothing is read")
        assert key is not None
        assert value is not None
        require(len(key.shape) == 4 == len(value.shape), "keys have not four dimensions")
        require_shape(key, batch, key.shape[1], tokens, size)
        require_shape(value, batch, key.shape[1], tokens, value.shape[3])
        kv_heads, value_size = key.shape[1], value.shape[3]
    else:
        require(key is None and value is None, "keys are given, and are in the cache")
        require(key_cache is not None and value_cache is not None, "there is no cache")
        assert key_cache is not None
        assert value_cache is not None
        require(len(key_cache.shape) == 3 == len(value_cache.shape), "a cache is not one")
        kv_heads, value_size = key_cache.shape[1], value_cache.shape[2]
        require_shape(key_cache, 0, kv_heads, size)
        require_shape(value_cache, 0, kv_heads, value_size)
        require(len(slots.shape) == 2 and slots.shape[0] == batch, "there are not slots for each sequence")
        require((lens if tokens == 1 else positions) is not None, "how far a token attends is not given")
    require_shape(lens, batch)
    require_shape(positions, batch, tokens)
    require_shape(sinks, heads)
    require(kv_heads > 0 and heads % kv_heads == 0, "heads do not share the KV heads evenly")
    window, chunk = call.ints
    require(window >= 0, "the window is negative")
    require_shape(out, batch, tokens, heads, value_size)
    if partial is not None and slots is not None:
        require(out is None and sinks is None and chunk > 0 and chunk % 64 == 0, "its parts are no chunks")
        require_shape(partial, batch, -(-slots.shape[1] // chunk), tokens, heads, value_size + 2)
        require(partial.dtype == "float32", "its parts are not float32")
    else:
        require(out is not None and partial is None, "it has no output")
    return [view for view in (out, partial) if view is not None]


def _join_attention(operands: Operands, call: Call) -> list[View]:
    require_given(operands, ".?.")
    require_numbers(call, 0)
    partial, sinks, out = operands
    assert partial is not None
    assert out is not None
    require_computed(partial, sinks, out)
    require_dense_last(partial, sinks, out)
    require(len(partial.shape) == 5 and len(out.shape) == 4 and partial.dtype == "float32", "it has no parts")
    batch, chunks, tokens, heads, size = partial.shape
    require(chunks > 0 and size > 2, "it has no parts")
    require_shape(out, batch, tokens, heads, size - 2)
    require_shape(sinks, heads)
    return [out]


ATTENTION_CHECKS: Mapping[str, Callable[[Operands, Call], list[View]]] = {
    "write_kv_cache": _write_kv_cache,
    "read_kv_cache": _read_kv_cache,
    "paged_attention": _paged_attention,
    "join_attention": _join_attention,
}
"""The check of each of these operators."""

CACHES: Mapping[str, Sequence[int]] = {"write_kv_cache": (2, 3), "read_kv_cache": (0,), "paged_attention": (3, 4)}
"""The operands that are KV caches: whole inputs, whose sizes nothing but the run knows."""
