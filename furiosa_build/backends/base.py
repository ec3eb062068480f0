"""Backends: what turns a graph into a program, and what loads the program again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from furiosa_build.backends.target import Target, check_isa, check_torch
from furiosa_build.core.errors import UserError, nearest
from furiosa_build.ir.kv_cache import KvCacheDtype

if TYPE_CHECKING:
    import torch

    from furiosa_build.backends.device import Device
    from furiosa_build.backends.graph import Graph
    from furiosa_build.ir.tensors import Layout


Option = bool | int | str


class LoadedProgram(Protocol):
    """A program ready to run, on tensors of its backend's device."""

    def run(self, inputs: Sequence[Any]) -> list[Any]:
        """Runs on tensors in the program's calling order. KV caches among `inputs` are updated in place."""
        ...


class ProgramLocation(NamedTuple):
    """Where a program is: the name of its file and, where the file holds several, its name in there."""

    file: str
    entry: str | None = None


@dataclass(frozen=True)
class Costs:
    """What compiling costs, in bytes.

    Attributes:
        worker: Private memory of a process that compiles, with all that it starts; None: that of any worker.
        program: Size of a typical program without constants.
        scratch: What a worker writes beside its program.
        library: Size of the library that programs call.
        library_worker: As `worker`, of a process that builds the library.
    """

    worker: int | None = None
    program: int = 20_000
    scratch: int = 0
    library: int = 0
    library_worker: int | None = None


class Packer(ABC):
    """The layout that a backend gives to stored parameters: a function of scheme, shape and target.

    A parameter is stored as one tensor or several, its parts: `scheme` and `part` are those of `quant.scheme`.
    """

    @abstractmethod
    def layout(self, scheme: str, part: str, layout: Layout) -> Layout:
        """The layout of a packed tensor, from that of the tensor. Does not need torch."""

    @abstractmethod
    def pack(self, scheme: str, part: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, packed."""


class Backend(ABC):
    """One way of compiling graphs. Instances are made without arguments and hold no state.

    Attributes:
        name: What recipes and artifacts call it.
        file_suffix: Of a program's file, such as `.so`.
        options: What `compiler_config_overrides` may set, by the type of its value.
        costs: What preflight reckons with.
        library: The name of the file that all programs call, for a backend that has one. It is built once, and is
            part of the artifact.
        kv_cache_dtypes: What KV caches of its programs may hold.
        checks_graphs: Whether there are graphs that `check_graph` refuses: a plan asks it then.
    """

    name: ClassVar[str]
    file_suffix: ClassVar[str]
    options: ClassVar[Mapping[str, type]] = {}
    costs: ClassVar[Costs] = Costs()
    library: ClassVar[str | None] = None
    kv_cache_dtypes: ClassVar[tuple[KvCacheDtype, ...]] = ("auto",)
    checks_graphs: ClassVar[bool] = False

    def check_toolchain(self) -> None:  # noqa: B027 (most need no tools)
        """Raises UserError when something needed to compile is missing. Cheap: does not import torch."""

    @abstractmethod
    def isa(self, requested: str) -> str:
        """The instruction set that programs for `requested` need; `any` if none. `native` means this machine's.

        Raises UserError that lists the backend's targets when `requested` is not one of them.
        """

    def check_host(self, target: Target, where: str) -> None:
        """Raises UserError when this machine cannot run programs for `target`. `where` is the file that states it.

        Cheap: does not import torch. Loading a program does not tell: a wrong instruction set kills the process later.
        """
        check_isa(target, where)
        check_torch(target, where)

    def instead_for(self, scheme: str) -> str:
        """What to build with instead, such as `backend=eager`, where programs cannot compute with weights of a scheme.

        Empty: they can.
        """
        del scheme
        return ""

    def key_factors(self) -> Mapping[str, str]:
        """Names and versions of the tools that shape a program or a packed parameter. Cheap: does not import torch."""
        return {}

    def packer(self, isa: str) -> Packer | None:
        """How parameters are packed for programs for `isa`; None: they are stored as they are.

        The `device` of a backend that packs says how a program takes a packed parameter. Does not need torch.
        """
        del isa
        return None

    def check_graph(self, graph: Graph) -> None:  # noqa: B027 (most compile any)
        """Raises UserError for a graph with something that this backend cannot compile."""

    @abstractmethod
    def compile(
        self,
        graph: Graph,
        output: Path,
        isa: str,
        scratch: Path,
        options: Mapping[str, Option] | None = None,
        core_aten: bool = False,
    ) -> None:
        """Writes the program for `graph` to `output`; `scratch` is a directory that may be kept between programs.

        `core_aten`: the program is made of operators of core ATen only.
        """

    def compile_all(
        self,
        graphs: Sequence[Graph],
        directory: Path,
        isa: str,
        scratch: Path,
        options: Mapping[str, Option] | None = None,
        core_aten: bool = False,
    ) -> None:
        """Compiles the graphs of one step; the program of graph N goes where `locate(N)` says, within `directory`."""
        for number, graph in enumerate(graphs):
            self.compile(graph, directory / self.locate(number).file, isa, scratch, options, core_aten)

    def locate(self, number: int) -> ProgramLocation:
        """Where `compile_all` writes the program of graph `number`: by default each is a file."""
        return ProgramLocation(f"program-{number}{self.file_suffix}")

    def library_factors(self) -> Mapping[str, str]:
        """What determines the bytes of the library: digests of its sources, versions of tools. Cheap, without torch."""
        return {}

    def build_library(self, output: Path, scratch: Path) -> None:
        """Writes the library to `output`; `scratch` is a directory that may be kept between builds.

        For backends that have a `library`. The same bytes wherever it is built.
        """
        raise NotImplementedError(f"the programs of backend {self.name!r} call no library")

    @abstractmethod
    def load(
        self, program: Path, concurrency: int = 1, entry: str | None = None, library: Path | None = None
    ) -> LoadedProgram:
        """Loads a program that `compile_all` wrote, which `concurrency` threads may run at the same time.

        `library` is the one that `build_library` wrote. Raises OSError, RuntimeError, TypeError or ValueError when
        `program` is not a file of this backend's, or has no such `entry`, or `library` is not its library.
        """

    @abstractmethod
    def device(self) -> Device[Any]:
        """Where programs run."""


def check_options(backend: Backend, overrides: Mapping[str, Option]) -> None:
    """Raises UserError, with the backend's list, for an option that it does not have, or of another type."""
    for name, value in overrides.items():
        wanted = backend.options.get(name)
        if wanted is None:
            raise UserError(
                f"backend {backend.name!r} has no option {name!r}",
                where="backend.compiler_config_overrides",
                valid=", ".join(sorted(backend.options)) or "none: it compiles nothing",
                hint=nearest(name, backend.options),
            )
        if type(value) is not wanted:
            raise UserError(
                f"{name}={value!r} is not of type {wanted.__name__}", where="backend.compiler_config_overrides"
            )
