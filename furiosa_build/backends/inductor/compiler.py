"""A compiler and directories that leave no trace in the programs that AOTInductor compiles."""

from __future__ import annotations

import atexit
import shlex
import shutil
import tempfile
from functools import cache
from pathlib import Path

from furiosa_build.backends.cxx import compiler_command

WORK_VARIABLE = "FURIOSA_BUILD_COMPILE_DIR"
"""Environment variable: the directory of the current program, for the wrapper that `path_free_compiler` writes."""


def path_free_compiler(scratch: Path) -> Path:
    """A compiler that forgets where it ran: inductor has no option for further flags, but takes any executable.

    It stays in one place, for torch remembers by the compiler's path what the compiler can do; the directory of the
    program at hand reaches it through the environment.
    """
    import torch

    torch_directory = shlex.quote(f"{Path(torch.__file__).parent}=torch")
    flags = f'-ffile-prefix-map={torch_directory} -ffile-prefix-map="${WORK_VARIABLE}"=.'
    wrapper = scratch / "c++"
    with tempfile.NamedTemporaryFile("w", dir=scratch, delete=False) as file:
        file.write(f'#!/bin/sh\nexec {shlex.join(compiler_command())} "$@" {flags}\n')
    Path(file.name).chmod(0o755)
    Path(file.name).replace(wrapper)
    return wrapper


@cache
def plain_path(directory: Path) -> Path:
    """The directory by a path that needs no quotes: torch puts paths into command lines as they are."""
    if _needs_no_quotes(str(directory)):
        return directory
    parent = next(parent for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp") if _needs_no_quotes(parent))
    own = Path(tempfile.mkdtemp(dir=parent, prefix="furiosa-build-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    (own / "scratch").symlink_to(directory)
    return own / "scratch"


def _needs_no_quotes(path: str) -> bool:
    return path.isascii() and shlex.quote(path) == path
