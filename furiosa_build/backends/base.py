"""Backends: what turns a graph into a program, and what loads the program again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from furiosa_build.core.errors import UserError, nearest

if TYPE_CHECKING:
    import torch

    from furiosa_build.backends.graph import Graph


Option = bool | int | str


class LoadedProgram(Protocol):
    """A program ready to run."""

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Runs on tensors in the program's calling order. KV caches among `inputs` are updated in place."""
        ...


class Backend(Protocol):
    """One way of compiling graphs. Instances are made without arguments and hold no state."""

    name: str
    file_suffix: str
    """Of a program's file, such as `.so`."""
    options: Mapping[str, type]
    """What `compiler_config_overrides` may set, by the type of its value."""

    def check_toolchain(self) -> None:
        """Raises UserError when something needed to compile is missing. Cheap: does not import torch."""
        ...

    def isa(self, requested: str) -> str:
        """The instruction set that programs for `requested` (a psABI level or `native`) need; `any` if none."""
        ...

    def key_factors(self) -> Mapping[str, str]:
        """Names and versions of the tools that shape a program. Cheap: does not import torch."""
        ...

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
        ...

    def load(self, program: Path, concurrency: int = 1) -> LoadedProgram:
        """Loads a program that `compile` wrote, which so many threads may run at the same time."""
        ...


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
            raise UserError(f"{name}={value!r} is no {wanted.__name__}", where="backend.compiler_config_overrides")
