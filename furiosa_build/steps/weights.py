"""What the steps that read weights share. Here, so that an edit of one of them does not make the others run again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from furiosa_build.weights.source import TensorSource

LARGEST_FILE = 4 << 30
"""Bytes in one file of parameters."""


def open_source(request: dict[str, Any]) -> TensorSource:
    """The weights that `source` and `directory` of a request describe. The latter may be a file: `param_file_path`."""
    from furiosa_build.weights.listing import Source
    from furiosa_build.weights.random import RandomSource
    from furiosa_build.weights.safetensors import open_checkpoint

    source = Source.model_validate(request["source"])
    if source.seed is not None:
        return RandomSource(source.parameters, source.seed)
    return open_checkpoint(Path(request["directory"]))
