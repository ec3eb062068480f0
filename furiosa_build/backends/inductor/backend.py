"""The inductor backend: AOTInductor on the CPU. The program is the shared library it makes.

The library is a function of the graph, the instruction set and the tools: file names are fixed, and build directories
are mapped away from `__FILE__`, so that two builds anywhere give the same bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from furiosa_build.backends import cpu
from furiosa_build.backends.base import Backend, Costs, LoadedProgram, Option
from furiosa_build.backends.cxx import check_compiler, compiler_version
from furiosa_build.backends.inductor.compiler import WORK_VARIABLE, path_free_compiler, plain_path
from furiosa_build.backends.target import unknown_target
from furiosa_build.core.text import path_text

if TYPE_CHECKING:
    import torch

    from furiosa_build.backends.graph import Graph
    from furiosa_build.backends.torch_device import TorchDevice

_SIMD_BITS = {"x86-64-v3": 256, "x86-64-v4": 512}


class InductorBackend(Backend):
    """Compiles with the host's C++ compiler: `$CXX`, or g++."""

    name = "inductor"
    file_suffix = ".so"
    # Measured with torch 2.13 on x86-64, the C++ compiler included.
    costs = Costs(worker=760_000_000, program=500_000, scratch=5_000_000)
    # Those of torch._inductor.config that shape a program for a CPU.
    options: ClassVar[Mapping[str, type]] = {
        "aggressive_fusion": bool,
        "cpp.enable_tiling_heuristics": bool,
        "cpp.enable_unsafe_math_opt_flag": bool,
        "cpp.max_horizontal_fusion_size": int,
        "cpp.min_chunk_size": int,
        "epilogue_fusion": bool,
        "max_autotune": bool,
        "max_fusion_size": int,
        "split_reductions": bool,
    }

    def check_toolchain(self) -> None:
        """Raises UserError when there is no C++ compiler."""
        check_compiler(self.name)

    def isa(self, requested: str) -> str:
        """The level itself; for `native` the highest level of this host that programs are made for."""
        level = cpu.host_isa() if requested == "native" else requested
        if level not in _SIMD_BITS:
            if requested != "native":
                raise unknown_target(self.name, requested, ["native", *_SIMD_BITS])
            hint = "name the level of the machine that will serve, or build with backend=eager"
            raise unknown_target(self.name, level, list(_SIMD_BITS), hint)
        return level

    def instead_for(self, scheme: str) -> str:
        """Nothing for weights of 4 bits: it would unpack all of them anew for every token."""
        return "backend=native" if scheme.partition("-")[0] == "int4" else ""

    def key_factors(self) -> Mapping[str, str]:
        """torch shapes the code, and the C++ compiler shapes the library."""
        return {"torch": version("torch"), "c++": compiler_version()}

    def compile(
        self,
        graph: Graph,
        output: Path,
        isa: str,
        scratch: Path,
        options: Mapping[str, Option] | None = None,
        core_aten: bool = False,
    ) -> None:
        """Compiles to a shared library. `scratch` keeps what torch has found out about the compiler."""
        self.check_toolchain()
        scratch.mkdir(parents=True, exist_ok=True)
        scratch = plain_path(scratch)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch)
        import torch
        from torch._inductor import aot_compile

        from furiosa_build.backends.cpu_lowerings import CORE_ATEN_LOWERINGS, LOWERINGS
        from furiosa_build.backends.lowering import export, lower_to_core_aten

        if core_aten:
            graph = lower_to_core_aten(graph, CORE_ATEN_LOWERINGS)
        program, examples = export(graph, LOWERINGS)
        with tempfile.TemporaryDirectory(dir=scratch, prefix="program-") as work, torch.no_grad():
            os.environ[WORK_VARIABLE] = work
            settings = {
                **(options or {}),
                "aot_inductor.output_path": f"{work}/program.so",
                "aot_inductor.model_name_for_generated_files": "program",
                "aot_inductor.enable_line_tables": False,
                # Precompiled headers cost 270 MB, the openssl program, and more time than they save for ten programs.
                "aot_inductor.precompile_headers": False,
                "cpp_cache_precompile_headers": False,
                "cpp.cxx": (None, str(path_free_compiler(scratch))),
                "cpp.dynamic_threads": True,
                "cpp.march": isa,
                "cpp.simdlen": _SIMD_BITS[isa],
            }
            library = Path(str(aot_compile(program.module(), examples, options=settings)))
            if library.with_suffix(".json").exists():
                raise RuntimeError(
                    "the program calls operators that AOTInductor cannot call without torch's dispatcher"
                )
            shutil.move(library, output)
        output.chmod(0o644)

    def load(
        self, program: Path, concurrency: int = 1, entry: str | None = None, library: Path | None = None
    ) -> LoadedProgram:
        """Raises RuntimeError when the library does not load."""
        del entry, library
        return _InductorProgram(program, concurrency)

    def device(self) -> TorchDevice:
        """The host."""
        from furiosa_build.backends.torch_device import TorchDevice

        return TorchDevice()


class _InductorProgram:
    def __init__(self, library: Path, concurrency: int) -> None:
        import torch  # noqa: F401  (libtorch must be loaded before a library that links to it)
        from torch._C._aoti import AOTIModelContainerRunnerCpu

        self._runner = AOTIModelContainerRunnerCpu(path_text(library.resolve()), concurrency)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._runner.run(list(inputs))
