"""What a slot of a KV cache holds, by the dtype that a recipe asks for: keys or values of a token, or codes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from furiosa_build.ir.dtypes import ITEMSIZE
from furiosa_build.ir.tensors import Layout

KvCacheDtype = Literal["auto", "int8", "fp8"]
"""`auto`: what the model computes in. Else codes of 8 bits, with a scale for each token and head."""

SCALE_BYTES = 4
"""A float32, behind the codes of a row."""

_CODES: Mapping[KvCacheDtype, str] = {"int8": "int8", "fp8": "float8_e4m3fn"}


def slot_layout(kv_cache_dtype: KvCacheDtype, dtype: str, shape: Sequence[int]) -> Layout:
    """dtype and [heads, row] of a slot, of a model's dtype and [heads, size]."""
    heads, size = shape
    if kv_cache_dtype == "auto":
        return Layout(dtype, (heads, size))
    return Layout(_CODES[kv_cache_dtype], (heads, size + SCALE_BYTES))


def has_codes(dtype: str) -> bool:
    """Whether a cache of this dtype has codes."""
    return dtype in _CODES.values()


def kv_cache_dtype_of(dtype: str) -> KvCacheDtype:
    """The inverse of `slot_layout`."""
    return next((name for name, codes in _CODES.items() if codes == dtype), "auto")


def size_of_row(dtype: str, row: int) -> int:
    """The size of a head whose row is of this dtype and length."""
    return row - SCALE_BYTES // ITEMSIZE[dtype] if has_codes(dtype) else row
