"""The native backend: programs are plans, which the library of kernels in the artifact runs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from furiosa_build.backends import cpu
from furiosa_build.backends.base import Backend, Costs, LoadedProgram, Option, Packer
from furiosa_build.backends.cxx import check_compiler, check_options, compiler_version
from furiosa_build.backends.target import Target, check_isa, unknown_target
from furiosa_build.ir.kv_cache import KvCacheDtype

if TYPE_CHECKING:
    from furiosa_build.backends.graph import Graph
    from furiosa_build.backends.native.device import NativeDevice

_ISA = "x86-64-v3"


class NativeBackend(Backend):
    """A graph is written down as calls of kernels; the library of these is compiled once, for any graph."""

    name = "native"
    file_suffix = ".plan"
    library: ClassVar[str | None] = "libkernels.so"
    kv_cache_dtypes: ClassVar[tuple[KvCacheDtype, ...]] = ("auto", "int8", "fp8")
    checks_graphs = True
    costs = Costs(program=60_000, library=1_000_000, library_worker=400_000_000, scratch=1_000_000)

    def check_toolchain(self) -> None:
        """Raises UserError when there is no C++ compiler that knows all instructions of the library's kernels."""
        from furiosa_build.backends.native.build_library import VARIANTS

        check_compiler(self.name)
        check_options(self.name, VARIANTS["amx"], "install g++ 11 or newer, or build with backend=eager")

    def isa(self, requested: str) -> str:
        """The least level that the library runs on: it takes more where the machine has more."""
        levels = cpu.levels()
        valid = ["native", *levels[levels.index(_ISA) :]]
        level = cpu.host_isa() if requested == "native" else requested
        if level not in valid:
            hint = "build with backend=eager" if requested == "native" else ""
            raise unknown_target(self.name, level, valid, hint)
        return _ISA

    def check_host(self, target: Target, where: str) -> None:
        """The instruction set; any release of torch will do."""
        check_isa(target, where)

    def instead_for(self, scheme: str) -> str:
        """For schemes that the kernels know: those of other packages are arithmetic in torch alone."""
        return "" if scheme.partition("-")[0] in ("none", "int8", "fp8", "int4") else "backend=eager"

    def key_factors(self) -> Mapping[str, str]:
        """torch shapes what graphs decompose into."""
        return {"torch": version("torch")}

    def packer(self, isa: str) -> Packer:
        del isa
        from furiosa_build.backends.native.packing import NativePacker

        return NativePacker()

    def check_graph(self, graph: Graph) -> None:
        """Raises UserError for a graph that calls what the library has no operator for."""
        from furiosa_build.backends.native.emit import make_plan

        make_plan(graph)

    def compile(
        self,
        graph: Graph,
        output: Path,
        isa: str,
        scratch: Path,
        options: Mapping[str, Option] | None = None,
        core_aten: bool = False,
    ) -> None:
        """Writes the plan. It calls nothing of ATen, so `core_aten` changes nothing."""
        del isa, scratch, options, core_aten
        from furiosa_build.backends.native.emit import make_plan

        output.write_bytes(make_plan(graph).to_json())

    def library_factors(self) -> Mapping[str, str]:
        """The kernels' sources, and the C++ compiler."""
        from furiosa_build.backends.native.build_library import library_key

        return {"c++": compiler_version(), "kernels": library_key()}

    def build_library(self, output: Path, scratch: Path) -> None:
        from furiosa_build.backends.native.build_library import build_library

        build_library(output, scratch)

    def load(
        self, program: Path, concurrency: int = 1, entry: str | None = None, library: Path | None = None
    ) -> LoadedProgram:
        """Raises ValueError when the file is not a plan that the library may run."""
        from furiosa_build.backends.native.plan import Plan
        from furiosa_build.backends.native.program import NativeProgram

        del entry
        if library is None:
            raise ValueError("it needs the artifact's library")
        if not cpu.supports(_ISA):  # whatever the artifact says: the library would end the process
            raise ValueError(f"the library needs instruction set {_ISA}, this machine has {cpu.host_isa()}")
        return NativeProgram(Plan.model_validate_json(program.read_bytes()), library, concurrency)

    def device(self) -> NativeDevice:
        """The host, with parameters as the library takes them."""
        from furiosa_build.backends.native.device import NativeDevice

        return NativeDevice()
