from __future__ import annotations

import pytest

from furiosa_build.backends import cpu

V2 = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3"
V3 = f"{V2} abm avx avx2 bmi1 bmi2 f16c fma movbe xsave"
V4 = f"{V3} avx512bw avx512cd avx512dq avx512f avx512vl"


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (V4, "x86-64-v4"),
        (V4.replace("avx512vl", ""), "x86-64-v3"),
        (V4.replace("avx2 ", ""), "x86-64-v2"),  # avx512 without avx2 is no level
        (V2, "x86-64-v2"),
        ("sse sse2", "other"),
        ("", "other"),
    ],
)
def test_levels_by_flags(flags: str, level: str) -> None:
    assert cpu.isa_of(f"processor\t: 0\nflags\t\t: fpu {flags}\nbugs\t: spectre_v1\n") == level


def test_other_architectures_have_no_flags_line() -> None:
    assert cpu.isa_of("processor\t: 0\nFeatures\t: fp asimd\n") == "other"


@pytest.mark.parametrize(
    ("isa", "here", "fits"),
    [
        ("any", "other", True),
        ("x86-64-v3", "x86-64-v4", True),
        ("x86-64-v3", "x86-64-v3", True),
        ("x86-64-v4", "x86-64-v3", False),
        ("x86-64-v2", "other", False),
        ("armv9", "x86-64-v4", False),
    ],
)
def test_supports(isa: str, here: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "host_isa", lambda: here)
    assert cpu.supports(isa) is fits


def test_this_host_supports_its_own_level() -> None:
    assert cpu.host_isa() == "other" or cpu.supports(cpu.host_isa())
