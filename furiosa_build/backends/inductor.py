"""The inductor backend: AOTInductor on the CPU. The program is the shared library it makes.

The library is a function of the graph, the instruction set and the tools: file names are fixed, and build directories
are mapped away from `__FILE__`, so that two builds anywhere give the same bytes.
"""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_build.backends.base import LoadedProgram, Option
from furiosa_build.core.cpu import host_isa
from furiosa_build.core.errors import UserError

if TYPE_CHECKING:
    import torch

    from furiosa_build.backends.graph import Graph

_SIMD_BITS = {"x86-64-v3": 256, "x86-64-v4": 512}
_WORK_VARIABLE = "FURIOSA_BUILD_COMPILE_DIR"


class InductorBackend:
    """Compiles with the host's C++ compiler: `$CXX`, or g++."""

    name = "inductor"
    file_suffix = ".so"
    # Those of torch._inductor.config that shape a program for a CPU.
    options: Mapping[str, type] = {
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
        if shutil.which(_compiler()) is None:
            raise UserError(
                f"backend inductor needs a C++ compiler, and {_compiler()!r} was not found",
                where="backend.name",
                hint="install g++ (Debian: apt-get install g++) or build with backend=eager, which needs none",
            )

    def isa(self, requested: str) -> str:
        """The level itself; for `native` the highest level of this host that programs are made for."""
        level = host_isa() if requested == "native" else requested
        if level not in _SIMD_BITS:
            raise UserError(
                f"backend inductor makes no programs for instruction set {level!r}",
                where="target.isa",
                valid=", ".join(_SIMD_BITS),
                hint="name the level of the machine that will serve, or build with backend=eager",
            )
        return level

    def key_factors(self) -> Mapping[str, str]:
        """torch shapes the code, and the C++ compiler shapes the library."""
        return {"torch": version("torch"), "c++": _compiler_version(_compiler())}

    def compile(
        self, graph: Graph, output: Path, isa: str, scratch: Path, options: Mapping[str, Option] | None = None
    ) -> None:
        """Compiles to a shared library. `scratch` keeps what torch has found out about the compiler."""
        self.check_toolchain()
        scratch.mkdir(parents=True, exist_ok=True)
        scratch = _plain(scratch)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch)
        import torch
        from torch._inductor import aot_compile

        program, examples = graph.export()
        with tempfile.TemporaryDirectory(dir=scratch, prefix="program-") as work, torch.no_grad():
            os.environ[_WORK_VARIABLE] = work
            settings = {
                **(options or {}),
                "aot_inductor.output_path": f"{work}/program.so",
                "aot_inductor.model_name_for_generated_files": "program",
                "aot_inductor.enable_line_tables": False,
                # Precompiled headers cost 270 MB, the openssl program, and more time than they save for ten programs.
                "aot_inductor.precompile_headers": False,
                "cpp_cache_precompile_headers": False,
                "cpp.cxx": (None, str(_path_free_compiler(scratch))),
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

    def load(self, program: Path, concurrency: int = 1) -> LoadedProgram:
        """Raises RuntimeError when the library does not load."""
        return _InductorProgram(program, concurrency)


class _InductorProgram:
    def __init__(self, library: Path, concurrency: int) -> None:
        import torch  # noqa: F401  (libtorch must be loaded before a library that links to it)
        from torch._C._aoti import AOTIModelContainerRunnerCpu

        self._runner = AOTIModelContainerRunnerCpu(str(library.resolve()), concurrency)

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._runner.run(list(inputs))


@cache
def _plain(directory: Path) -> Path:
    """The directory by a path that needs no quotes: torch puts paths into command lines as they are."""
    if _needs_no_quotes(str(directory)):
        return directory
    place = next(place for place in (tempfile.gettempdir(), "/tmp", "/var/tmp") if _needs_no_quotes(place))
    own = Path(tempfile.mkdtemp(dir=place, prefix="furiosa-build-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    (own / "scratch").symlink_to(directory)
    return own / "scratch"


def _needs_no_quotes(path: str) -> bool:
    return path.isascii() and shlex.quote(path) == path


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


@cache
def _compiler_version(compiler: str) -> str:
    found = shutil.which(compiler)
    if found is None:
        return "none"
    return subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _path_free_compiler(scratch: Path) -> Path:
    """A compiler that forgets where it ran: inductor has no option for further flags, but takes any executable.

    It stays in one place, for torch remembers by the compiler's path what the compiler can do; the directory of the
    program at hand reaches it through the environment.
    """
    import torch

    torch_directory = shlex.quote(f"{Path(torch.__file__).parent}=torch")
    flags = f'-ffile-prefix-map={torch_directory} -ffile-prefix-map="${_WORK_VARIABLE}"=.'
    wrapper = scratch / "c++"
    with tempfile.NamedTemporaryFile("w", dir=scratch, delete=False) as file:
        file.write(f'#!/bin/sh\nexec {shlex.quote(_compiler())} "$@" {flags}\n')
    Path(file.name).chmod(0o755)
    Path(file.name).replace(wrapper)
    return wrapper
