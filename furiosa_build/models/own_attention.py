"""Attention that transformers' code of a model computes itself: ALiBi, and models older than the attention interface.

Such a layer still asks its cache: it hands over the keys and values of new tokens, and goes on with those of the whole
context. There the paged KV cache comes in, and all else runs as transformers wrote it, over the context of a bucket:
its slots in order, with a mask that hides what lies beyond each token. `models.check_own_attention` checks that a model
can be run so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

Keep = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""Keys and values of new tokens [batch, kv_heads, query, size], length of the context -> those of the whole context."""

_keep: ContextVar[Keep] = ContextVar("keep")


@contextmanager
def keeping(keep: Keep) -> Iterator[None]:
    """Within, `keep` is the cache of the layer that runs."""
    token = _keep.set(keep)
    try:
        yield
    finally:
        _keep.reset(token)


class _ContextLayer(CacheLayerMixin):
    """The cache of a layer, for `query` new tokens at the end of a context of a fixed length."""

    def __init__(self, query: int, context: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._query, self._context = query, context

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        del args, kwargs
        return _keep.get()(key_states, value_states, self._context)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        del query_length
        return self._context, 0

    def get_seq_length(self) -> int:
        return self._context - self._query

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        del key_states, value_states
        raise AssertionError("it holds nothing")


def context_cache(layers: int, query: int, context: int) -> Cache:
    """What a model is called with as its cache, to be run over contexts of a fixed length."""
    return Cache(layers=[_ContextLayer(query, context) for _ in range(layers)])


@contextmanager
def masks_at(positions: Tensor) -> Iterator[None]:
    """Within, masks are those of new tokens at `positions` [batch, query] of their contexts, and are always made."""
    names = ("eager", "sdpa")
    for name in names:
        make = ALL_MASK_ATTENTION_FUNCTIONS[name]
        ALL_MASK_ATTENTION_FUNCTIONS[name] = partial(_mask_at, make, positions)
    try:
        yield
    finally:
        for name in names:
            del ALL_MASK_ATTENTION_FUNCTIONS[name]


def _mask_at(
    make: Callable[..., Tensor], positions: Tensor, *, mask_function: Callable[..., Tensor], **kwargs: Any
) -> Tensor:
    offset = kwargs["q_offset"]

    def at_position(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_function(batch, head, positions[batch, query - offset], key)

    return make(mask_function=at_position, **{**kwargs, "allow_is_causal_skip": False})
