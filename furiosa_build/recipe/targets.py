"""The targets of conf/target, by name and by the devices that they have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from furiosa_build.core.devices import DeviceError, elements, kind_of
from furiosa_build.core.errors import UserError, nearest


def load_target(name: str, roots: Sequence[Path]) -> dict[str, Any]:
    """The target described by conf/target/NAME.yaml. Raises UserError."""
    files = _files(roots)
    if name not in files:
        raise UserError(
            f"there is no target {name!r}", where="target", valid=", ".join(sorted(files)), hint=nearest(name, files)
        )
    from omegaconf import OmegaConf

    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(files[name])))


def target_with(devices: str, roots: Sequence[Path], where: str) -> str | None:
    """The target that has these devices, where they are elements of an NPU; None where no target is one.

    Raises UserError where several targets have them. `where`: what names the devices.
    """
    if not is_npu(devices):
        return None
    targets = {name: load_target(name, roots) for name in sorted(_files(roots))}
    npus = [name for name, target in targets.items() if is_of_npu(target)]
    found = [name for name in npus if _has(targets[name], devices)] or npus
    if len(found) > 1:
        what = f"there are several targets with devices={devices!r}"
        raise UserError(what, where=where, valid=" or ".join(f"target={name}" for name in found))
    return found[0] if found else None


def is_npu(devices: str) -> bool:
    """Whether they are elements of NPUs."""
    try:
        return kind_of(devices) == "npu"
    except DeviceError:  # said when the recipe is validated
        return False


def is_of_npu(target: dict[str, Any]) -> bool:
    """Whether a target is an NPU: it has several processing elements."""
    count = target.get("num_elements", 1)
    return isinstance(count, int) and count > 1


def _has(target: dict[str, Any], devices: str) -> bool:
    try:
        return bool(elements(devices, target["num_elements"]))
    except DeviceError:
        return False


def _files(roots: Sequence[Path]) -> dict[str, Path]:
    return {path.stem: path for root in reversed(roots) for path in (root / "conf" / "target").glob("*.yaml")}
