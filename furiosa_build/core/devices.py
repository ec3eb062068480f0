"""Devices as the API writes them, and how many processing elements they are: `npu:0:*`, `npu:0:0-3,npu:1:*`, `cpu`."""

from __future__ import annotations

import re
from collections.abc import Iterator

FORMS = "cpu, cpu:N, cuda:N, npu:X, npu:X:*, npu:X:A, npu:X:A-B, or several of them joined by commas"

_HOST = re.compile(r"(cpu|cuda)(?::(\d+))?")
_NPU = re.compile(r"npu:(\d+)(?::(\*|(\d+)(?:-(\d+))?))?")


class DeviceError(ValueError):
    """A list of devices is malformed; `valid` says what is valid."""

    def __init__(self, what: str, valid: str = FORMS) -> None:
        super().__init__(what)
        self.valid = valid


def kind_of(devices: str) -> str:
    """`cpu`, `cuda` or `npu`. Raises DeviceError for a mixture."""
    kinds = sorted({device.strip().partition(":")[0] for device in devices.split(",")})
    if len(kinds) > 1:
        raise DeviceError(f"devices={devices!r} mixes {' and '.join(kinds)}", "devices of one kind")
    return kinds[0]


def elements(devices: str, of_npu: int) -> list[str]:
    """Every processing element, such as `npu:0:3`; a CPU or a GPU is one. Raises DeviceError.

    Args:
        devices: Joined by commas.
        of_npu: Elements of an NPU, which `npu:0` and `npu:0:*` mean all of.
    """
    found: list[str] = []
    for device in devices.split(","):
        for element in _elements(device.strip(), of_npu):
            if element in found:
                raise DeviceError(f"devices={devices!r} names {element} twice", "every element once")
            found.append(element)
    kind_of(devices)
    return found


def _elements(device: str, of_npu: int) -> Iterator[str]:
    if match := _HOST.fullmatch(device):
        if match[1] == "cuda" and match[2] is None:
            raise DeviceError(f"the device {device!r} is not well formed")
        yield f"{match[1]}:{match[2] or 0}"
    elif match := _NPU.fullmatch(device):
        card, which, first, last = match.groups()
        numbers = range(of_npu) if which in (None, "*") else range(int(first), int(last or first) + 1)
        if not numbers or numbers[-1] >= of_npu:
            raise DeviceError(f"{device!r} is not there", f"elements 0 to {of_npu - 1} of a device of this target")
        for number in numbers:
            yield f"npu:{card}:{number}"
    else:
        raise DeviceError(f"the device {device!r} is not well formed")
