"""What logits are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Asked(NamedTuple):
    """Tokens, int64 [tokens], and the positions whose logits are asked for, int64 [positions]."""

    tokens: Tensor
    after: Tensor


class Expected(NamedTuple):
    """Logits, float32 [positions, vocab]: as they are, and as if no layer rounded its input."""

    logits: Tensor
    unrounded: Tensor


class Reference(Protocol):
    """The model of an artifact, run by transformers."""

    @property
    def dtype(self) -> str:
        """What it computes in, such as `bfloat16`."""
        ...

    def logits(self, asked: Sequence[Asked]) -> list[Expected]:
        """The logits of several sequences, each as if it were alone."""
        ...

    def nudged(self, asked: Sequence[Asked]) -> list[list[Tensor]]:
        """The logits of several sequences, of each several times, as if the model rounded otherwise."""
        ...
