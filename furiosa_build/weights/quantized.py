"""The directory of a checkpoint that is quantized already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from furiosa_build.core.errors import UserError
from furiosa_build.quant.compressed_tensors import KEY, QuantizedCheckpoint, parse_checkpoint
from furiosa_build.weights.hf_layout import read_json


def read_checkpoint(directory: Path, model: Mapping[str, Any], layers: int | None) -> QuantizedCheckpoint:
    """The checkpoint in `directory`, of the model that the fields of a config.json describe, of `layers` layers or all.

    Raises UserError when it is of another model, or quantized in a way that this version cannot compute.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(
            "the quantized checkpoint has no config.json",
            where=f"{KEY}: {directory}",
            valid="a directory with a compressed-tensors checkpoint: config.json and safetensors files",
        )
    return parse_checkpoint(path, read_json(path), model, layers)
