"""Rounds keys and values of transformers' attention as KV caches of codes do, and can leave it out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from furiosa_build.ir.kv_cache import KvCacheDtype
from furiosa_build.steps.qualification.reference import Asked, Expected, Reference

if TYPE_CHECKING:
    from torch import Tensor


class CacheRounding:
    """Within this context keys and values of all models of this process are rounded.

    Transformers' models ask for their attention function by `get_interface`: here it rounds first what it is given.
    """

    def __init__(self, kv_cache_dtype: KvCacheDtype) -> None:
        self._dtype, self._is_on = kv_cache_dtype, True
        self._found: Any = None

    def __enter__(self) -> CacheRounding:
        from transformers import AttentionInterface

        found = self._found = AttentionInterface.get_interface

        def get_interface(interface: AttentionInterface, *arguments: Any) -> Callable[..., Any]:
            attend = found(interface, *arguments)

            def rounded(module: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any, **keywords: Any) -> Any:
                if self._is_on:
                    key, value = (round_rows(x, self._dtype) for x in (key, value))
                return attend(module, query, key, value, *others, **keywords)

            return rounded

        AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        from transformers import AttentionInterface

        AttentionInterface.get_interface = self._found  # type: ignore[method-assign]

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within, nothing is rounded."""
        self._is_on = False
        try:
            yield
        finally:
            self._is_on = True

    def of(self, reference: Reference) -> Reference:
        """A reference, which says as well what it gives without rounding."""
        return _Rounded(reference, self)


class _Rounded:
    def __init__(self, reference: Reference, rounding: CacheRounding) -> None:
        self._reference, self._rounding = reference, rounding
        self.dtype = reference.dtype

    def logits(self, asked: Sequence[Asked]) -> list[Expected]:
        found = self._reference.logits(asked)
        with self._rounding.left_out():
            exact = self._reference.logits(asked)
        return [Expected(one.logits, other.unrounded) for one, other in zip(found, exact, strict=True)]

    def nudged(self, asked: Sequence[Asked]) -> list[list[Tensor]]:
        return self._reference.nudged(asked)


def round_rows(x: Tensor, kv_cache_dtype: KvCacheDtype) -> Tensor:
    """Rows [..., size] of keys or values as a KV cache of codes gives them, rounded to their dtype."""
    import torch

    largest = 127 if kv_cache_dtype == "int8" else 448
    scale = x.float().abs().amax(-1, keepdim=True) / largest
    steps = x.float() / torch.where(scale == 0, 1, scale)
    codes = steps.round() if kv_cache_dtype == "int8" else steps.to(torch.float8_e4m3fn).float()
    return (codes * scale).to(x.dtype)
