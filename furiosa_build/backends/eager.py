"""The eager backend: the program is the graph itself, run operator by operator through torch. Needs no C++ compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from furiosa_build.backends.base import LoadedProgram, Option

if TYPE_CHECKING:
    import torch

    from furiosa_build.backends.graph import Graph


class EagerBackend:
    """Stores the graph as JSON. For debugging, and wherever compiling is not worth its time."""

    name = "eager"
    file_suffix = ".json"
    options: Mapping[str, type] = {}

    def check_toolchain(self) -> None:
        """Nothing beyond torch is needed."""

    def isa(self, requested: str) -> str:
        """Any instruction set: torch brings its own kernels."""
        del requested
        return "any"

    def key_factors(self) -> Mapping[str, str]:
        """The file is the graph whatever the version of torch."""
        return {}

    def compile(
        self, graph: Graph, output: Path, isa: str, scratch: Path, options: Mapping[str, Option] | None = None
    ) -> None:
        """Writes the graph's canonical JSON."""
        del isa, scratch, options
        output.write_bytes(graph.to_json())

    def load(self, program: Path, concurrency: int = 1) -> LoadedProgram:
        """Raises ValueError, TypeError or RuntimeError when the file is not a graph of ATen calls."""
        from furiosa_build.backends.graph import Graph

        del concurrency  # a graph keeps nothing between or during calls
        return _EagerProgram(Graph.from_json(program.read_bytes()))


class _EagerProgram:
    def __init__(self, graph: Graph) -> None:
        self._module = graph.to_module()

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(cast("tuple[torch.Tensor, ...]", self._module(*inputs)))
