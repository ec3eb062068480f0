"""`ArtifactBuilder` under the name that the Furiosa LLM API imports it by; it is defined in `furiosa_build.build`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["ArtifactBuilder"]  # noqa: F822 (found by __getattr__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # By its name, since the format of an artifact must not depend on the builder.
    return getattr(import_module("furiosa_build.build.artifact_builder"), name)
