"""What this machine's processor can run, in the levels of the x86-64 psABI."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

# Flags as /proc/cpuinfo spells them; each level also needs those of the levels before it.
_LEVELS = {
    "x86-64-v2": "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3",
    "x86-64-v3": "abm avx avx2 bmi1 bmi2 f16c fma movbe xsave",
    "x86-64-v4": "avx512bw avx512cd avx512dq avx512f avx512vl",
}
ANY = "any"
"""Instruction set of programs that run on every machine."""
_OTHER = "other"


def isa_of(cpuinfo: str) -> str:
    """The highest psABI level that the text of a /proc/cpuinfo describes; `other` if not even x86-64-v2."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    flags = next((set(value.split()) for key, _, value in lines if key.strip() == "flags"), set())
    best = _OTHER
    for level, needed in _LEVELS.items():
        if not flags.issuperset(needed.split()):
            break
        best = level
    return best


@cache
def host_isa() -> str:
    """`x86-64-v4`, `x86-64-v3`, `x86-64-v2`, or `other`."""
    try:
        return isa_of(Path("/proc/cpuinfo").read_text())
    except OSError:
        return _OTHER


def processor_name() -> str:
    """What the processor calls itself; its architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def supports(isa: str) -> bool:
    """Whether this machine runs programs for `isa`: a psABI level, or `any`. False for other names."""
    if isa == ANY:
        return True
    order, host = levels(), host_isa()
    return isa in order and host in order and order.index(isa) <= order.index(host)


def levels() -> list[str]:
    """The names of the psABI levels, each of which has all that those before it have."""
    return list(_LEVELS)
