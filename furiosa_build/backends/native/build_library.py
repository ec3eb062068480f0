"""Compiles csrc/ into the library that runs programs: the same bytes from any directory."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from furiosa_build.backends.cxx import compiler_command, compiler_version

CSRC = Path(__file__).parent / "csrc"

_V4 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_DOT = (*_V4, "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi")
VARIANTS: Mapping[str, Sequence[str]] = {
    "v3": ("-march=x86-64-v3",),
    "v4": _V4,
    "dot": _DOT,
    "amx": (*_DOT, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
}
"""The instruction sets that kernels are compiled for, with the compiler's options. A variant is a namespace."""

_EVERYWHERE, _KERNEL, _PRODUCT, _MATRIX = ("v3",), ("v3", "v4"), ("v3", "v4", "dot"), ("v3", "v4", "dot", "amx")
SOURCES: Mapping[str, Sequence[str]] = {
    "cpu.cpp": _EVERYWHERE,
    "pool.cpp": _EVERYWHERE,
    "program.cpp": _EVERYWHERE,
    "registry.cpp": _EVERYWHERE,
    "attention.cpp": _PRODUCT,
    "copy.cpp": _KERNEL,
    "embedding.cpp": _KERNEL,
    "gather.cpp": _KERNEL,
    "kv_cache.cpp": _KERNEL,
    "linear.cpp": _MATRIX,
    "linear_groups.cpp": _PRODUCT,
    "matmul.cpp": _KERNEL,
    "norm.cpp": _KERNEL,
    "numbers.cpp": _MATRIX,
    "pointwise.cpp": _KERNEL,
    "reduce.cpp": _KERNEL,
    "rotary.cpp": _KERNEL,
    "round_rows.cpp": _KERNEL,
    "scatter.cpp": _KERNEL,
    "softmax.cpp": _KERNEL,
    "topk.cpp": _KERNEL,
}
"""The files of the library, and the variants that each is compiled for: those of no kernel run everywhere."""

_COMPILE = (
    *("-std=c++17", "-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-fno-math-errno", "-fno-trapping-math"),
    *("-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-pthread"),
)
# The C++ library is linked in, so that the machine that runs an artifact needs none.
_LINK = ("-shared", "-pthread", "-static-libstdc++", "-static-libgcc", "-s", "-Wl,--build-id=none", "-Wl,--gc-sections")
_EXPORTS = "exports.map"
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


class _Object(NamedTuple):
    source: str
    variant: str

    def options(self) -> list[str]:
        return [*_COMPILE, *VARIANTS[self.variant], f"-DFURIOSA_VARIANT={self.variant}"]

    def name(self) -> str:
        return f"{self.source.removesuffix('.cpp')}-{self.variant}.o"


def build_library(output: Path, scratch: Path, extra: Sequence[str] = ()) -> None:
    """Writes the library to `output`. Objects stay in `scratch`, and are used again if no file of theirs has changed.

    `extra` are further options of the compiler, such as a sanitizer's. Raises RuntimeError with the compiler's words
    when it fails.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    # An instance of a template that several variants have is taken from the first: the least demanding.
    order = sorted(_objects(), key=lambda item: (list(VARIANTS).index(item.variant), item.source))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as executor:
        objects = list(executor.map(lambda item: _compile(item, scratch, extra), order))
    exports = f"-Wl,--version-script={CSRC / _EXPORTS}"
    _run([*compiler_command(), *_LINK, *extra, exports, *map(str, objects), "-o", str(output)])


@cache
def library_key() -> str:
    """What determines the bytes of the library, but the compiler: a digest of sources and options."""
    digest = hashlib.sha256(repr((SOURCES, VARIANTS, _COMPILE, _LINK)).encode())
    for file in sorted(CSRC.iterdir()):
        if file.suffix in (".h", ".cpp", ".map"):
            digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def _objects() -> Iterator[_Object]:
    for source, variants in SOURCES.items():
        for variant in variants:
            yield _Object(source, variant)


def _compile(item: _Object, scratch: Path, extra: Sequence[str]) -> Path:
    key = _object_key(item, extra)
    kept = scratch / key[:20] / item.name()
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch) as directory:
            made = Path(directory) / item.name()
            mapped = f"-ffile-prefix-map={CSRC}=csrc"
            _run([*compiler_command(), *item.options(), *extra, mapped, "-c", str(CSRC / item.source), "-o", str(made)])
            shutil.move(made, kept)
    return kept


def _object_key(item: _Object, extra: Sequence[str]) -> str:
    digest = hashlib.sha256(repr((compiler_version(), item.options(), extra)).encode())
    for name in sorted(included_by(item.source)):
        digest.update(name.encode() + (CSRC / name).read_bytes())
    return digest.hexdigest()


def included_by(source: str) -> set[str]:
    """A file of csrc/, the headers there that it includes, those that they include, and so on."""
    found: set[str] = set()
    left = [source]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _INCLUDE.findall((CSRC / name).read_text())
    return found


def _run(command: Sequence[str]) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{ran.stderr}")
