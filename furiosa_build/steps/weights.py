"""What the steps that read weights share. Here, so that an edit of one of them does not make the others run again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.ir.outline import Outline
from furiosa_build.steps.base import Request

if TYPE_CHECKING:
    from furiosa_build.weights.source import TensorSource

LARGEST_FILE = 4 << 30
"""Bytes in one file of parameters."""


class WeightsRequest(Request):
    """A step that reads weights: its inputs are their files, those of the source or those that `quantize` has written.

    Attributes:
        outline: The model.
        hf_config: The fields of its config.json.
        schemes: The scheme of each quantized parameter, by name.
        seed: Draw the weights from this seed, and read no file.
        taken: The source is a quantized checkpoint, which is taken as it is.
        ranks: Ranks of a stage.
        stages: The layers of each stage.
    """

    outline: Outline
    hf_config: dict[str, Any]
    schemes: dict[str, str]
    seed: int | None = None
    taken: bool = False
    ranks: int
    stages: list[list[int]]


def weight_files(files: Mapping[str, Path]) -> dict[str, Path]:
    """Those of `files` that hold weights."""
    return {name: path for name, path in sorted(files.items()) if name.endswith(".safetensors")}


def open_weights(request: WeightsRequest, files: Mapping[str, Path]) -> TensorSource:
    """The weights of a request, whose inputs are `files`."""
    from furiosa_build.weights.random import RandomSource
    from furiosa_build.weights.safetensors import SafetensorsSource

    if request.seed is not None:
        return RandomSource(request.outline.parameters, request.seed)
    return SafetensorsSource(list(weight_files(files).values()))


def described(files: Mapping[str, Path]) -> str:
    """Where weights come from, for messages: their directory, or the one file that is called otherwise."""
    for name, path in weight_files(files).items():
        return str(path.parent if path.name == name else path)
    return "random weights"
