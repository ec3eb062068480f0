"""What determines a step: its key is the digest of everything its output depends on, and of nothing else.

No path, no time, no host name. What a step runs is part of the key: see `plan.source_code`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from furiosa_build import __version__
from furiosa_build.core.canonical_json import digest


def key_factors(
    step: str,
    reads: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, str]],
    tools: Mapping[str, str],
    source: Mapping[str, str],
) -> dict[str, Any]:
    """All that determines a step's output, as plain data.

    Args:
        step: Kind of step.
        reads: What it reads of the BuildSpec and the outline.
        inputs: sha256 of the files it consumes, by the step that made them.
        tools: Versions of the tools that shape its output.
        source: Digests of the project's modules that it runs.
    """
    return {
        "step": step,
        "reads": dict(reads),
        "inputs": {step: dict(files) for step, files in inputs.items()},
        "tools": dict(tools),
        "source": dict(source),
    }


def key_of(factors: Mapping[str, Any]) -> str:
    """The key: sha256 (hex) of the factors."""
    return digest(factors)


class ToolVersions:
    """Installed versions of packages, each read once: all keys of a build are about the same tools."""

    def __init__(self) -> None:
        self._known = {"furiosa_build": __version__, "python": ".".join(map(str, sys.version_info[:2]))}

    def of(self, packages: Iterable[str]) -> dict[str, str]:
        """By package, without importing them; `python` is one as well, without its patches.

        Raises PackageNotFoundError.
        """
        for package in packages:
            if package not in self._known:
                self._known[package] = version(package)
        return {package: self._known[package] for package in packages}

    def of_installed(self, packages: Iterable[str]) -> dict[str, str]:
        """Those of the packages that are installed."""
        found: dict[str, str] = {}
        for package in packages:
            with suppress(PackageNotFoundError):
                found |= self.of((package,))
        return found
