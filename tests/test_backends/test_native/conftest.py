"""The library of kernels, compiled once for the session; its tests run for each part of a processor that it has
kernels for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from compiled_kernels import link_kernels

from furiosa_build.backends.native import build_library as builder
from furiosa_build.backends.native.library import Library

_HERE = Path(__file__).parent

_LIMITS = {"all": 0, "no-amx": 1, "no-dot": 2, "avx2": 3}


def _has(flag: str) -> bool:
    return flag in Path("/proc/cpuinfo").read_text().split()


@pytest.fixture(scope="session")
def library_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("native") / "kernels.so"
    link_kernels(file)
    return file


@pytest.fixture(scope="session")
def library(library_file: Path) -> Library:
    return Library(library_file)


@pytest.fixture(scope="session")
def library_with_emulated_amx(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The library on a processor with AMX, whose instructions are computed in C++."""
    directory = tmp_path_factory.mktemp("native")
    sources = directory / "csrc"
    shutil.copytree(builder.CSRC, sources)
    shutil.copy(_HERE / "cpu_with_amx.cpp", sources / "cpu.cpp")
    shutil.copy(_HERE / "emulated_amx.h", sources)
    kernel = sources / "linear_amx.h"
    kernel.write_text('#include "emulated_amx.h"\n' + kernel.read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "CSRC", sources)
        link_kernels(directory / "kernels.so")
    return Library(directory / "kernels.so")


@pytest.fixture(params=[name for name in _LIMITS if name != "no-amx" or _has("amx_tile")])
def each_cpu(library: Library, request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library as it is on processors that have less."""
    library.limit_cpu(_LIMITS[request.param])
    yield library
    library.limit_cpu(0)


@pytest.fixture(params=[name for name in (*_LIMITS, "emulated-amx") if name != "no-amx" or _has("amx_tile")])
def each_matrix_cpu(request: pytest.FixtureRequest) -> Iterator[Library]:
    """The same, and with AMX wherever tests run."""
    if request.param == "emulated-amx" and not _has("avx512_bf16"):
        pytest.skip("what surrounds the emulated instructions needs AVX-512 with dot products")
    emulates = request.param == "emulated-amx"
    library: Library = request.getfixturevalue("library_with_emulated_amx" if emulates else "library")
    library.limit_cpu(0 if emulates else _LIMITS[request.param])
    yield library
    library.limit_cpu(0)


@pytest.fixture(params=["all", "avx2"])
def each_width(library: Library, request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library with vectors of 512 and of 256 bits."""
    library.limit_cpu(_LIMITS[request.param])
    yield library
    library.limit_cpu(0)
