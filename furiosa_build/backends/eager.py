"""The eager backend: the program is the graph itself, run operator by operator through torch. Needs no C++ compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_build.backends import cpu
from furiosa_build.backends.base import Backend, LoadedProgram, Option
from furiosa_build.backends.target import unknown_target

if TYPE_CHECKING:
    import torch

    from furiosa_build.backends.graph import Graph
    from furiosa_build.backends.graph_interpreter import GraphInterpreter
    from furiosa_build.backends.torch_device import TorchDevice


class EagerBackend(Backend):
    """Stores the graph as JSON. For debugging, and wherever compiling is not worth its time."""

    name = "eager"
    file_suffix = ".json"

    def isa(self, requested: str) -> str:
        """Any instruction set: torch brings its own kernels. What is requested has to be one all the same."""
        valid = ["native", *cpu.levels()]
        if requested not in valid:
            raise unknown_target(self.name, requested, valid)
        return cpu.ANY

    def compile(
        self,
        graph: Graph,
        output: Path,
        isa: str,
        scratch: Path,
        options: Mapping[str, Option] | None = None,
        core_aten: bool = False,
    ) -> None:
        """Writes the graph's canonical JSON; for core ATen, with each operator beside it as it lowers."""
        del isa, scratch, options
        if core_aten:
            from furiosa_build.backends.cpu_lowerings import CORE_ATEN_LOWERINGS
            from furiosa_build.backends.lowering import lower_to_core_aten

            graph = lower_to_core_aten(graph, CORE_ATEN_LOWERINGS)
        output.write_bytes(graph.to_json())

    def load(
        self, program: Path, concurrency: int = 1, entry: str | None = None, library: Path | None = None
    ) -> LoadedProgram:
        """Raises ValueError, TypeError or RuntimeError when the file is not a graph of operators that may be called."""
        from furiosa_build.backends.cpu_lowerings import LOWERINGS
        from furiosa_build.backends.graph import Graph
        from furiosa_build.backends.graph_interpreter import GraphInterpreter

        del concurrency, entry, library  # a graph keeps nothing between or during calls
        return _EagerProgram(GraphInterpreter(Graph.from_json(program.read_bytes()), LOWERINGS))

    def device(self) -> TorchDevice:
        """The host."""
        from furiosa_build.backends.torch_device import TorchDevice

        return TorchDevice()


class _EagerProgram:
    def __init__(self, graph: GraphInterpreter) -> None:
        self._graph = graph

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return list(self._graph(*inputs))
