"""The inputs of a graph in the making, and the export of a function of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from furiosa_build.backends.graph import dtype_name, export_module
from furiosa_build.ir.tensors import Role, TensorSpec
from furiosa_build.models.partition import CutGraph, cut


class GraphInputs:
    """The inputs of a graph, in calling order."""

    def __init__(self) -> None:
        self.specs: list[TensorSpec] = []

    def add(
        self, name: str, role: Role, shape: Sequence[int | None], dtype: torch.dtype, block: int | None = None
    ) -> int:
        """Adds an input; returns its position."""
        self.specs.append(TensorSpec(name=name, role=role, dtype=dtype_name(dtype), shape=list(shape), block=block))
        return len(self.specs) - 1

    def add_parameters(self, parameters: Mapping[str, Tensor], block: int | None = None) -> dict[str, int]:
        """Adds parameters by name; returns their positions."""
        return {name: self.add(name, "parameter", p.shape, p.dtype, block) for name, p in sorted(parameters.items())}

    def export(self, forward: Callable[..., tuple[Tensor, ...]], outputs: Sequence[str]) -> CutGraph:
        """The graph of a function of all inputs, in order, whose results are called `outputs`."""
        program, _ = export_module(_Function(forward), self.specs)
        return cut(program, self.specs, outputs)


class _Function(nn.Module):
    """A function as a module without parameters, which is what `torch.export` takes."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self._function = function

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        # A compiled program takes its inputs' strides for granted: what one returns and the next takes is contiguous.
        return tuple(value.contiguous() for value in self._function(*values))


@contextmanager
def fake_tensors(tensor: Tensor | None = None) -> Iterator[None]:
    """Tensors made inside are fake: shapes without memory. Joins the mode that `tensor` was made in."""
    mode = getattr(tensor, "fake_mode", None) or torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with torch.no_grad(), mode:
        yield
