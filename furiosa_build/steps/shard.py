"""partition:weights: the parameters of every rank of every stage, as the files the runtime maps.

There is one stage and one rank today: a quantized checkpoint's files are the parameter files as they are, by hard link.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from furiosa_build.plan.outline import Outline
from furiosa_build.progress import expect
from furiosa_build.steps.weights import LARGEST_FILE, open_source


def run(request: dict[str, Any], output: Path) -> dict[str, str]:
    """Writes or links `stage-0-rank-0-*.safetensors`; returns their sha256.

    request: `checkpoint` (file name -> {path, sha256} of the quantized weights; empty when there are none), and what
    `steps.quantize` takes: `source`, `directory`, `outline`.
    """
    checkpoint: dict[str, dict[str, str]] = request["checkpoint"]
    if not checkpoint:
        return _write(request, output)
    digests = {}
    for name, (_, file) in zip(_file_names(len(checkpoint)), sorted(checkpoint.items()), strict=True):
        os.link(file["path"], output / name)
        digests[name] = file["sha256"]
    return digests


def _write(request: dict[str, Any], output: Path) -> dict[str, str]:
    import torch

    from furiosa_build.models.safetensors_file import SafetensorsWriter, split_into_files
    from furiosa_build.models.weights import layout_of

    parameters = Outline.model_validate(request["outline"]).parameters
    source = open_source(request)
    files = split_into_files(({name: layout_of(p)} for name, p in parameters.items()), LARGEST_FILE)
    expect(sum(layout.nbytes for layouts in files for layout in layouts.values()))
    digests = {}
    for name, layouts in zip(_file_names(len(files)), files, strict=True):
        with SafetensorsWriter(output / name, layouts) as writer:
            for tensor in writer.order:
                writer.write(tensor, source.read(tensor).to(getattr(torch, parameters[tensor].dtype)))
        digests[name] = writer.sha256
    return digests


def _file_names(count: int, stage: int = 0, rank: int = 0) -> list[str]:
    return [f"stage-{stage}-rank-{rank}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
