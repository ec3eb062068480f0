"""The runtime: generates text from an artifact. It needs nothing of the builder.

Importing this package is cheap; torch is imported when one of the names below is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from furiosa_build.runtime.async_engine import AsyncLLMEngine
    from furiosa_build.runtime.engine import LLMEngine
    from furiosa_build.runtime.engine_args import AsyncEngineArgs, EngineArgs
    from furiosa_build.runtime.llm import LLM
    from furiosa_build.runtime.pooling import PoolingParams
    from furiosa_build.runtime.request import RequestOutput
    from furiosa_build.runtime.sampling.params import SamplingParams

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLMEngine",
    "EngineArgs",
    "LLMEngine",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
]

_HOMES = {
    "LLM": "llm",
    "AsyncEngineArgs": "engine_args",
    "AsyncLLMEngine": "async_engine",
    "EngineArgs": "engine_args",
    "LLMEngine": "engine",
    "PoolingParams": "pooling",
    "RequestOutput": "request",
    "SamplingParams": "sampling.params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
