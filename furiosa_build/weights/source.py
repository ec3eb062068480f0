"""A source of weights: named tensors, each read when it is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from furiosa_build.ir.tensors import Layout

if TYPE_CHECKING:
    from torch import Tensor


class TensorSource(Protocol):
    """Named tensors, each read when it is asked for."""

    def names(self) -> set[str]:
        """All there are."""
        ...

    def layout(self, name: str) -> Layout:
        """A tensor's dtype and shape, without reading it."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor. A mapped one costs no memory until it is used."""
        ...
