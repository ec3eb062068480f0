"""What determines a step: its key is the digest of everything its output depends on, and of nothing else.

No path, no time, no host name. What a step runs is part of the key: the digest of its module's source and of all
modules of this project that it imports, found by reading import statements.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from furiosa_build.canonical import digest

_PACKAGE = Path(__file__).resolve().parent.parent
_IMPORT = re.compile(r"^\s*(?:from|import) +(furiosa_build(?:\.\w+)*)(?: +import +(\(.*?\)|[^\n]*))?", re.M | re.S)


def key_factors(
    step: str,
    reads: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, str]],
    tools: Mapping[str, str],
    modules: Iterable[str],
) -> dict[str, Any]:
    """All that determines a step's output, as plain data.

    Args:
        step: Kind of step.
        reads: What it reads of the BuildSpec and the outline.
        inputs: sha256 of the files it consumes, by the step that made them.
        tools: Versions of the tools that shape its output.
        modules: The project's modules that it runs.
    """
    return {
        "step": step,
        "reads": dict(reads),
        "inputs": {step: dict(files) for step, files in inputs.items()},
        "tools": dict(tools),
        "source": source_digests(modules),
    }


def key_of(factors: Mapping[str, Any]) -> str:
    """The key: sha256 (hex) of the factors."""
    return digest(factors)


def tool_versions(*packages: str) -> dict[str, str]:
    """Installed versions, by package, without importing them."""
    return {package: version(package) for package in packages}


def source_digests(modules: Iterable[str]) -> dict[str, str]:
    """sha256 of the source of these modules of the project and of all that they import of it, directly or not."""
    # The package itself holds the version: a release is no reason to build everything again.
    names = imported_modules(tuple(modules)) - {"furiosa_build"}
    return {name: _file_digest(name) for name in sorted(names)}


@cache
def imported_modules(modules: tuple[str, ...]) -> frozenset[str]:
    """The closure of `modules` under imports within the project."""
    found: set[str] = set()
    pending = list(modules)
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += [*_direct_imports(name), name.rpartition(".")[0] or name]  # Importing runs the package too.
    return frozenset(found)


@cache
def _direct_imports(module: str) -> frozenset[str]:
    found: set[str] = set()
    for base, names in _IMPORT.findall(_source(module).read_text()):
        found.add(base)
        imported = [name.split(" as ")[0].strip() for name in names.strip("() \n").split(",")]
        found.update(f"{base}.{name}" for name in imported if name.isidentifier())
    return frozenset(name for name in found if _source(name).is_file())


def _source(module: str) -> Path:
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _file_digest(module: str) -> str:
    return hashlib.sha256(_source(module).read_bytes()).hexdigest()
