"""The pool and its programs under sanitizers, which see races and wrong accesses that tests of results do not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from furiosa_build.backends.cxx import compiler_command
from furiosa_build.backends.native.build_library import CSRC

_SOURCES = [Path(__file__).parent / "stress.cpp", CSRC / "pool.cpp", CSRC / "program.cpp"]


@pytest.mark.grid
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_the_pool_under_a_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    options = [
        "-std=c++17",
        "-O1",
        "-g",
        "-pthread",
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        f"-I{CSRC}",
    ]
    program = tmp_path / "stress"
    subprocess.run([*compiler_command(), *options, *map(str, _SOURCES), "-o", str(program)], check=True)
    # Where memory is laid out at random, ThreadSanitizer may not find the room it needs.
    ran = subprocess.run(["setarch", "-R", program], capture_output=True, text=True, check=False, timeout=300)
    assert (ran.returncode, ran.stdout) == (0, "fine\n"), ran.stderr
