"""The library of kernels, compiled once for the session; again for each part of a processor that it has kernels for."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from furiosa_build.backends.native.build_library import build_library
from furiosa_build.backends.native.library import Library

# `make sanitize` sets it to what else the kernels are to be compiled with.
_OPTIONS = ["-Wall", "-Wextra", "-Werror", *shlex.split(os.environ.get("FURIOSA_TEST_KERNEL_OPTIONS", ""))]
# Objects are kept by what they are made of, for the next session and for the workers of this one.
_OBJECTS = Path(tempfile.gettempdir()) / f"furiosa-build-test-objects-{os.getuid()}"


@pytest.fixture(scope="session")
def library_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("native") / "kernels.so"
    build_library(file, _OBJECTS, _OPTIONS)
    return file


@pytest.fixture(scope="session")
def library(library_file: Path) -> Library:
    return Library(library_file)


@pytest.fixture(params=["all", "no-dot", "avx2"])
def each_cpu(library: Library, request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library as it is on processors that have less."""
    library.limit_cpu(["all", "no-dot", "avx2"].index(request.param))
    yield library
    library.limit_cpu(0)


@pytest.fixture(params=["all", "avx2"])
def each_width(library: Library, request: pytest.FixtureRequest) -> Iterator[Library]:
    """The library with vectors of 512 and of 256 bits."""
    library.limit_cpu(0 if request.param == "all" else 2)
    yield library
    library.limit_cpu(0)
