"""The library is a function of its sources."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from furiosa_build.backends.cxx import compiler_command
from furiosa_build.backends.native import build_library as builder

_FEW = {"cpu.cpp": ("v3",), "pool.cpp": ("v3",), "numbers.cpp": ("v3", "v4")}


def test_the_bytes_do_not_depend_on_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "SOURCES", _FEW)
    libraries = []
    for name in ("one", "another directory"):
        sources = tmp_path / name / "csrc"
        shutil.copytree(builder.CSRC, sources)
        monkeypatch.setattr(builder, "CSRC", sources)
        builder.build_library(tmp_path / f"{name}.so", tmp_path / name / "objects")
        libraries.append((tmp_path / f"{name}.so").read_bytes())
    assert libraries[0] == libraries[1]


def test_what_a_source_includes_is_what_the_compiler_says() -> None:
    """Objects are compiled anew when one of these files changes."""
    sources = sorted(builder.SOURCES)
    options = ["-MM", "-march=x86-64-v4", "-mamx-tile", "-DFURIOSA_VARIANT=v4"]
    command = [*compiler_command(), *options, *(str(builder.CSRC / source) for source in sources)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace("\\\n", "")
    files = [{Path(word).name for word in line.split()[1:]} for line in said.splitlines()]
    assert files == [builder.included_by(source) for source in sources]


def test_only_the_interface_can_be_seen(library_file: Path) -> None:
    listed = subprocess.run(["nm", "-D", "--defined-only", library_file], capture_output=True, text=True, check=True)
    assert {line.split()[-1] for line in listed.stdout.splitlines()} == {
        f"furiosa_{name}"
        for name in ("pool_create", "pool_destroy", "program_create", "program_destroy", "program_run", "limit_cpu")
    }


def test_the_library_has_instructions_of_amx(library_file: Path) -> None:
    """Wherever it was compiled."""
    listed = subprocess.run(["objdump", "-d", library_file], capture_output=True, text=True, check=True).stdout
    assert {"ldtilecfg", "tdpbf16ps", "tdpbsud", "tilerelease"} <= set(listed.split())


def test_the_library_needs_the_c_library_alone(library_file: Path) -> None:
    listed = subprocess.run(["readelf", "-d", library_file], capture_output=True, text=True, check=True).stdout
    needed = [line.partition("[")[2].rstrip("]") for line in listed.splitlines() if "(NEEDED)" in line]
    assert set(needed) <= {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}


def test_what_the_compiler_says_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "copy.cpp").write_text("int f() { return nothing; }")
    monkeypatch.setattr(builder, "SOURCES", {"copy.cpp": ("v3",)})
    monkeypatch.setattr(builder, "CSRC", sources)
    with pytest.raises(RuntimeError, match="nothing"):
        builder.build_library(tmp_path / "kernels.so", tmp_path / "objects")
