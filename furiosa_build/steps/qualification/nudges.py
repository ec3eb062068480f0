"""Runs a model as if it rounded otherwise: where a choice hangs on the last bits, such as one of experts, it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from furiosa_build.steps.qualification.reference import Asked

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

UNITS = (1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4, 8, 8, 8, 8)
"""How far values are moved at most, in units in the last place, each time that a model runs. A layer rounds after some
ten operations, up as often as down. The least turns choices that are as good as even, the most turns many at once."""


class Nudges:
    """Changes what enters each decoder layer by some units in the last place, up or down, when it is told to.

    Args:
        layers: The decoder layers of a model.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._units = 0
        self._drawing: Generator | None = None
        for layer in layers:
            layer.register_forward_pre_hook(self._before, with_kwargs=True)

    def runs(self, run: Callable[[Sequence[Asked]], list[Tensor]], asked: Sequence[Asked]) -> list[list[Tensor]]:
        """What `run` gives for each sequence, once for each of `UNITS`; always the same."""
        import torch

        self._drawing = torch.Generator().manual_seed(0)
        found = []
        try:
            for self._units in UNITS:
                found.append(run(asked))
        finally:
            self._units = 0
        return [list(each) for each in zip(*found, strict=True)]

    def _before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        del layer
        if not self._units:
            return None
        if args:
            return (self._nudged(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._nudged(kwargs["hidden_states"])}

    def _nudged(self, hidden: Tensor) -> Tensor:
        import torch

        units = torch.randint(-self._units, self._units + 1, hidden.shape, generator=self._drawing)
        return (hidden.float() * (1 + torch.finfo(hidden.dtype).eps * units)).to(hidden.dtype)
