"""Runs a model as if it rounded otherwise: where a choice hangs on the last bits, such as one of experts, it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from furiosa_build.steps.qualification.reference import Asked

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

_DRAWS = 16
"""How often each sequence runs. A choice that is as good as even is missed once in 2**16 times."""

_UNITS = (1, 2, 4, 8)
"""How far values are moved at most, in units in the last place: a layer rounds after some ten operations, up as often
as down. The least turns choices that are as good as even, the most turns many at once."""


class Nudges:
    """Changes what enters each decoder layer by some units in the last place, up or down, when it is told to.

    Args:
        layers: The decoder layers of a model.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._drawing: Generator | None = None
        for layer in layers:
            layer.register_forward_pre_hook(self._before, with_kwargs=True)

    def runs(self, run: Callable[[Sequence[Asked]], list[Tensor]], asked: Sequence[Asked]) -> list[list[Tensor]]:
        """What one `run` gives for each sequence, several times; always the same."""
        import torch

        self._drawing = torch.Generator().manual_seed(0)
        try:
            found = run([*asked] * _DRAWS)
        finally:
            self._drawing = None
        return [found[number :: len(asked)] for number in range(len(asked))]

    def _before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        del layer
        if self._drawing is None:
            return None
        if args:
            return (_nudged(args[0], self._drawing), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _nudged(kwargs["hidden_states"], self._drawing)}


def _nudged(hidden: Tensor, drawing: Generator) -> Tensor:
    import torch

    most = _UNITS[int(torch.randint(len(_UNITS), (), generator=drawing))]
    units = torch.randint(-most, most + 1, hidden.shape, generator=drawing)
    return (hidden.float() * (1 + torch.finfo(hidden.dtype).eps * units)).to(hidden.dtype)
