"""loading: what transformers makes of a model's config.json and of the names in its checkpoint. Before the survey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.steps.base import Inputs, Job, Request

OUTPUT = "loading.json"


class LoadingRequest(Request):
    """What is known of a model before its weights are read.

    Attributes:
        config: The fields of its config.json.
        layers: How many of its layers are taken; None: all.
        stored: dtype and shape of the tensors that its checkpoint stores; None: they are drawn, or not here yet.
        stored_dtype: The dtype that they have in common.
        quantized: Which of them are quantized: targets with their schemes, and what is ignored; None: none.
    """

    config: dict[str, Any]
    layers: int | None
    stored: dict[str, tuple[str, list[int]]] | None
    stored_dtype: str | None
    quantized: tuple[dict[str, str], list[str]] | None


class FindLoading(Job[LoadingRequest]):
    """Writes loading.json."""

    name = "loading"
    Request = LoadingRequest
    packages = ("torch", "transformers")

    def run(self, request: LoadingRequest, inputs: Inputs, output: Path) -> None:
        from furiosa_build.ir.tensors import Layout
        from furiosa_build.quant.compressed_tensors import QuantizedCheckpoint
        from furiosa_build.weights.loading import find_loading

        stored = request.stored
        quantized = request.quantized
        found = find_loading(
            request.config,
            request.layers,
            None if stored is None else {name: Layout(dtype, tuple(shape)) for name, (dtype, shape) in stored.items()},
            request.stored_dtype,
            None if quantized is None else QuantizedCheckpoint(quantized[0], tuple(quantized[1])),
        )
        (output / OUTPUT).write_bytes(canonical_json(found.model_dump()))
