"""Operators that write caches, as torch is told about them here: of what they write it knows nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from furiosa_build.backends.ops import size_of_head

torch.library.define(
    "furiosa_native::paged_attention",
    "(Tensor query, Tensor? key, Tensor? value, Tensor key_cache, Tensor value_cache, Tensor? slot_mapping, "
    "Tensor? context_slots, Tensor? context_lens, Tensor? position_ids, float? scaling, int? sliding_window, "
    "float? softcap=None, Tensor? sinks=None) -> Tensor",
)
torch.library.define(
    "furiosa_native::write_kv_cache",
    "(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping) -> Tensor",
)


def _attended(
    query: Tensor, key: Tensor | None, value: Tensor | None, key_cache: Tensor, value_cache: Tensor, *others: object
) -> Tensor:
    del key, value, key_cache, others
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, size_of_head(value_cache)))


def _token(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> Tensor:
    del value, key_cache, value_cache, slot_mapping
    return key.new_empty(())


torch.library.register_fake("furiosa_native::paged_attention", _attended)
torch.library.register_fake("furiosa_native::write_kv_cache", _token)
paged_attention = torch.ops.furiosa_native.paged_attention.default
write_kv_cache = torch.ops.furiosa_native.write_kv_cache.default
