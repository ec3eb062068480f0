"""furiosa_build: from a short recipe to a versioned, verified artifact of a large language model.

Importing this package is cheap; what a name below needs is imported when the name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from furiosa_build.build.artifact_builder import ArtifactBuilder
    from furiosa_build.runtime import LLM, AsyncLLMEngine, LLMEngine, SamplingParams

__version__ = "0.1.0"

__all__ = ["LLM", "ArtifactBuilder", "AsyncLLMEngine", "LLMEngine", "SamplingParams"]

_HOMES = {
    "ArtifactBuilder": "furiosa_build.build.artifact_builder",
    "AsyncLLMEngine": "furiosa_build.runtime",
    "LLM": "furiosa_build.runtime",
    "LLMEngine": "furiosa_build.runtime",
    "SamplingParams": "furiosa_build.runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
