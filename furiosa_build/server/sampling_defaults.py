"""Sampling parameters of requests that give none: those of generation_config.json, as vLLM's server takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.sampling.params import SamplingParams

_FILE = "generation_config.json"
_TAKEN = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
"""Whether it says `do_sample` is not asked, as in vLLM: a temperature of 0 is how a request asks for greedy tokens."""


class SamplingDefaults(NamedTuple):
    """Parameters by the engine's names, and the most tokens of a chat's answer; None: as many as fit."""

    params: Mapping[str, Any] = MappingProxyType({})
    max_tokens: int | None = None


def read(model_directory: Path, choice: str) -> SamplingDefaults:
    """The defaults of a server.

    Args:
        model_directory: The artifact's model/ directory.
        choice: `auto`: of the file in it, if there is one; `vllm`: none; else the directory of a file.

    Raises:
        UserError: The file cannot be read, or has values that no request could have.
    """
    if choice == "vllm":
        return SamplingDefaults()
    path = (model_directory if choice == "auto" else Path(choice)) / _FILE
    if choice == "auto" and not path.is_file():
        return SamplingDefaults()
    hint = "serve with --generation-config vllm, which takes nothing of it"
    try:
        config = json.loads(path.read_bytes())
        given = {name: config[name] for name in _TAKEN if config.get(name) is not None}
        max_tokens = config.get("max_new_tokens")
        SamplingParams(max_tokens=max_tokens, **given)
    except UserError as error:
        raise UserError(error.what, where=str(path), valid=error.valid, hint=hint) from error
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"the sampling defaults cannot be read: {error}", where=str(path), hint=hint) from error
    return SamplingDefaults(given, max_tokens)
