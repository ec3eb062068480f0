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
from furiosa_build.ir.dtypes import ITEMSIZE
from furiosa_build.ir.kv_cache import SCALE_BYTES


def _rows_of(cache: View) -> tuple[int, int]:
    """How many heads a cache has, and their size."""
    require(len(cache.shape) == 3 and cache.shape[0] == 0, "a cache is not one")
    size = cache.shape[2] - (SCALE_BYTES if _has_codes(cache) else 0)
    require(size > 0, "a cache has no room for a head")
    return cache.shape[1], size


def _has_codes(cache: View) -> bool:
    return cache.dtype in ("int8", "uint8")


def _require_whole_words(key_cache: View) -> None:
    require(key_cache.shape[2] * ITEMSIZE[key_cache.dtype] % 4 == 0, "keys are of an odd size")


def _write_kv_cache(operands: Operands, call: Call) -> list[View]:
    require_given(operands, ".....")
    require_numbers(call, 0)
    key, value, key_cache, value_cache, slots = present(operands)
    require_integer(slots)
    _require_whole_words(key_cache)
    for new, cache in ((key, key_cache), (value, value_cache)):
        require(len(new.shape) == 4, "new tokens have not four dimensions")
        require((new.shape[1], new.shape[3]) == _rows_of(cache), "a cache is of other heads")
        require([new.shape[0], new.shape[2]] == slots.shape, "there is not a slot for each token")
        require_computed(new)
        require(new.dtype == cache.dtype or _has_codes(cache), "a cache is of another dtype")
        require_dense_last(new)
    return [key_cache, value_cache]


def _read_kv_cache(operands: Operands, call: Call) -> list[View]:
    require_given(operands, "...")
    require_numbers(call, 1)
    require(call.ints[0] in (0, 1), "a cache has keys or values")
    cache, slots, out = present(operands)
    require_integer(slots)
    require(len(slots.shape) == 2, "its slots are not such")
    require_shape(out, *slots.shape, *_rows_of(cache))
    require_computed(out)
    require(out.dtype == cache.dtype, "dtypes differ")
    if call.ints[0] == 0:
        _require_whole_words(cache)
    require_dense_last(out)
    return [out]


def _paged_attention(operands: Operands, call: Call) -> list[View]:
    require_given(operands, "....?????")
    require_numbers(call, 2, 2)
    query, key_cache, value_cache, slots, lens, positions, sinks, out, partial = operands
    assert query is not None
    assert key_cache is not None
    assert value_cache is not None
    assert slots is not None
    require_computed(query, sinks, out, *(cache for cache in (key_cache, value_cache) if not _has_codes(cache)))
    require_integer(slots, lens, positions)
    require_dense_last(query, sinks, out, partial, slots, lens, positions)
    require(len(query.shape) == 4, "the query has not four dimensions")
    batch, heads, tokens, size = query.shape
    kv_heads, key_size = _rows_of(key_cache)
    value_heads, value_size = _rows_of(value_cache)
    require((kv_heads, key_size) == (value_heads, size), "a cache is of other heads")
    _require_whole_words(key_cache)
    require(len(slots.shape) == 2 and slots.shape[0] == batch, "there are not slots for each sequence")
    require(lens is None or positions is None, "how far a token attends is given twice")
    require_shape(lens, batch)
    require_shape(positions, batch, tokens)
    require_shape(sinks, heads)
    require(kv_heads > 0 and heads % kv_heads == 0, "heads do not share the KV heads evenly")
    window, chunk = call.ints
    require(window >= 0, "the window is negative")
    require_shape(out, batch, tokens, heads, value_size)
    if partial is not None:
        require(out is None and sinks is None and chunk > 0 and chunk % 64 == 0, "its parts are no chunks")
        require_shape(partial, batch, -(-slots.shape[1] // chunk), tokens, heads, value_size + 2)
        require(partial.dtype == "float32", "its parts are not float32")
    else:
        require(out is not None, "it has no output")
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

CACHES: Mapping[str, Sequence[int]] = {"write_kv_cache": (2, 3), "read_kv_cache": (0,), "paged_attention": (1, 2)}
"""The operands that are KV caches: whole inputs, whose sizes nothing but the run knows."""
