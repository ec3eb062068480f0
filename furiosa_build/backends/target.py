"""What programs need of the machine that runs them, and whether this machine has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from furiosa_build.backends import cpu
from furiosa_build.core.errors import UserError, nearest


@dataclass(frozen=True)
class Target:
    """What programs need of the machine that runs them, as the artifact states it.

    Attributes:
        isa: The instruction set, by a name of the backend's; `any` for portable programs.
        torch: The release of torch; `any` or nothing if any will do.
    """

    isa: str
    torch: str


def check_isa(target: Target, where: str) -> None:
    """Raises UserError when this machine lacks the instruction set, a level of the x86-64 psABI."""
    if not cpu.supports(target.isa):
        raise UserError(
            f"the artifact's programs need instruction set {target.isa!r}, this is {cpu.host_isa()!r}",
            where=where,
            hint="build it for this machine, or use backend eager",
        )


def check_torch(target: Target, where: str) -> None:
    """Raises UserError when the installed torch is not of the release that `target` names."""
    if target.torch in ("", "any"):
        return
    try:
        installed = version("torch")
    except PackageNotFoundError:
        installed = "(none)"
    if _release(target.torch) != _release(installed):
        raise UserError(
            f"the artifact's programs need torch {target.torch}, and torch {installed} is installed",
            where=where,
            hint=f"pip install torch=={_release(target.torch)}, or build the artifact again",
        )


def _release(torch_version: str) -> str:
    """Without the local part: `2.13.0+cpu` and `2.13.0` load the same programs."""
    return torch_version.partition("+")[0]


def unknown_target(backend: str, requested: str, valid: Sequence[str], hint: str = "") -> UserError:
    """The refusal of a `target.isa` that a backend does not compile for."""
    return UserError(
        f"backend {backend} makes no programs for instruction set {requested!r}",
        where="target.isa",
        valid=", ".join(valid),
        hint=hint or nearest(requested, valid),
    )
