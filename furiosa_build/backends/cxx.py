"""The host's C++ compiler: `$CXX`, a command as a shell would split it, or g++."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from itertools import dropwhile

from furiosa_build.core.errors import UserError

_DEFAULT = "g++"
_MISSING = "none"


def check_compiler(backend: str) -> None:
    """Raises UserError when there is no C++ compiler, which `backend` needs."""
    if _version(tuple(compiler_command())) == _MISSING:
        raise UserError(
            f"backend {backend} needs a C++ compiler, and {os.environ.get('CXX') or _DEFAULT!r} was not found",
            where="backend.name",
            hint="install g++ (Debian: apt-get install g++) or build with backend=eager, which needs none",
        )


def check_options(backend: str, options: Sequence[str], hint: str) -> None:
    """Raises UserError with `hint` when the compiler, which there is, does not know `options`."""
    command = [*compiler_command(), *options, "-x", "c++", "-E", os.devnull]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        reason = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[0]
        raise UserError(
            f"backend {backend} needs a C++ compiler with {' '.join(options)}: {reason}",
            where="backend.name",
            hint=hint,
        )


def compiler_version() -> str:
    """What determines the compiler's output: the first line of its version, and the flags among the words of `$CXX`.

    `none` without a compiler. A launcher such as ccache changes nothing of a library.
    """
    command = compiler_command()
    flags = list(dropwhile(lambda word: not word.startswith("-"), command))
    return " ".join([_version(tuple(command)), *flags])


def compiler_command() -> list[str]:
    """The words that start the compiler."""
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
