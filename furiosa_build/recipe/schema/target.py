"""Sections `target` and `backend`: the machine, and the compiler for it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from furiosa_build.recipe.schema.section import PositiveInt, Section


class TargetSpec(Section):
    """The machine that programs are compiled for.

    Attributes:
        isa: The instruction set, by a name of the backend's, or `native`: that of this host.
        num_elements: Processing elements of one device: what `npu:0:*` names.
        memory_gb: Memory of one device in GB (10^9 bytes). None: this host's where `isa` is `native`, else unknown.
            A build whose parameters and KV cache do not fit is refused; where the number of KV blocks is not
            given, it is limited by this memory.
    """

    name: str
    isa: Annotated[str, Field(min_length=1)] = "native"
    num_elements: PositiveInt = 1
    memory_gb: Annotated[float, Field(gt=0, strict=False, allow_inf_nan=False)] | None = None


class BackendSpec(Section):
    """Which compiler makes the programs: the name of a backend (`furiosa_build.backends.registry`).

    `compiler_config_overrides` sets its options; an unknown one is refused, with the list of those that it has.
    """

    name: str
    compiler_config_overrides: dict[str, bool | int | str] = Field(default={})
