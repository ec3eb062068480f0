"""The host's C++ compiler: `$CXX`, a command as a shell would split it, or g++."""

from __future__ import annotations

import atexit
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from itertools import dropwhile
from pathlib import Path

from furiosa_build.core.errors import UserError

_DEFAULT = "g++"
_MISSING = "none"

WORK_VARIABLE = "FURIOSA_BUILD_COMPILE_DIR"
"""Environment variable: the directory of the current program, for the wrapper that `path_free_compiler` writes."""


def check_compiler() -> None:
    """Raises UserError when there is no C++ compiler."""
    if _version(tuple(_command())) == _MISSING:
        raise UserError(
            f"backend inductor needs a C++ compiler, and {os.environ.get('CXX') or _DEFAULT!r} was not found",
            where="backend.name",
            hint="install g++ (Debian: apt-get install g++) or build with backend=eager, which needs none",
        )


def compiler_version() -> str:
    """What determines the compiler's output: the first line of its version, and the flags among the words of `$CXX`.

    `none` without a compiler. A launcher such as ccache changes nothing of a library.
    """
    command = _command()
    flags = list(dropwhile(lambda word: not word.startswith("-"), command))
    return " ".join([_version(tuple(command)), *flags])


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
        file.write(f'#!/bin/sh\nexec {shlex.join(_command())} "$@" {flags}\n')
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


def _command() -> list[str]:
    command = os.environ.get("CXX") or _DEFAULT
    try:
        return shlex.split(command) or [_DEFAULT]
    except ValueError as error:
        raise UserError(f"CXX={command!r} is not a command: {error}", where="environment") from error


@cache
def _version(command: tuple[str, ...]) -> str:
    if shutil.which(command[0]) is None:
        return _MISSING
    ran = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return ran.stdout.splitlines()[0] if ran.returncode == 0 and ran.stdout else _MISSING
