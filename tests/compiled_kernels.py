"""The library of kernels, compiled once for all tests of a machine."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path

from furiosa_build.backends.native import build_library

# `make sanitize` sets it to what else the kernels are to be compiled with.
OPTIONS = ["-Wall", "-Wextra", "-Werror", *shlex.split(os.environ.get("FURIOSA_TEST_KERNEL_OPTIONS", ""))]
# Objects are kept by what they are made of, for the next session and for the workers of this one.
OBJECTS = Path(tempfile.gettempdir()) / f"furiosa-build-test-objects-{os.getuid()}"


def link_kernels(output: Path) -> None:
    """Writes the library, of objects that are there already unless their sources have changed."""
    build_library.build_library(output, OBJECTS, OPTIONS)
