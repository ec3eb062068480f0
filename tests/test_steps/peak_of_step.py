"""Prints as JSON how much private memory (MiB) steps take at their peak, for a model of 2 layers and for one of 16.

A process of its own: `python peak_of_step.py DIRECTORY`. Memory that a step leaves behind can make what follows seem to
take more, never the other way round, since all that is small comes first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from furiosa_build.core.peak_memory import Watch, give_back
from furiosa_build.ir.outline import Outline
from furiosa_build.models.analyze import survey
from furiosa_build.steps.base import Inputs
from furiosa_build.steps.qualification.original import Original
from furiosa_build.steps.qualification.original_model import LayeredOriginalModel, OriginalModel
from furiosa_build.steps.qualification.reference import Asked
from furiosa_build.steps.qualification.stored import StoredModel
from furiosa_build.steps.quantize import Quantize
from furiosa_build.steps.registry import find
from furiosa_build.steps.shard import Shard, ShardRequest
from furiosa_build.steps.weights import open_weights

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
"""A layer of 10 MiB."""


CASES = (
    ("quantize", "fp8", "seed"),
    ("quantize", "int8", "files"),
    ("shard", "none", "seed"),
    ("shard", "none", "files"),
    ("qualify", "int8", "seed"),
    ("qualify", "none", "files"),
    ("qualify", "none", "cast files"),
)
"""Step, quantization, and where the weights come from: drawn from a seed, or files, which are mapped if not cast."""


def main(directory: Path) -> None:
    peaks: dict[str, list[float]] = {" ".join(case): [] for case in CASES}
    for layers in (2, 16):
        config = {**CONFIG, "num_hidden_layers": layers}
        outline = survey(config)
        for case in CASES:
            work = directory / f"{layers} {' '.join(case)}"
            work.mkdir()
            peaks[" ".join(case)].append(measure(*case, config, outline, work))
    print(json.dumps(peaks))


def measure(step: str, scheme: str, source: str, config: dict[str, Any], outline: Outline, work: Path) -> float:
    request, files = make_request(scheme, source, config, outline, work)
    if step != "quantize" and scheme != "none":
        request, files = make_checkpoint(request, files, work / "checkpoint")
    (work / "output").mkdir()
    give_back()
    with Watch() as watch:
        if step == "qualify":
            run_reference(request, files, work, source.startswith("cast"))
        else:
            find(step).run(request, Inputs(files, work), work / "output")
    assert watch.peak is not None
    return watch.peak.private / 2**20


Made = tuple[ShardRequest, dict[str, Path]]


def make_request(scheme: str, source: str, config: dict[str, Any], outline: Outline, work: Path) -> Made:
    request = ShardRequest(
        outline=outline,
        hf_config=config,
        schemes={n: scheme for n, p in outline.parameters.items() if p.linear and scheme != "none"},
        seed=0,
        ranks=1,
        stages=[sorted(layer for block in outline.blocks for layer in block.layers)],
    )
    if source == "seed":
        return request, {}
    (work / "model").mkdir()
    made = Shard().run(request.model_copy(update={"schemes": {}}), Inputs({}, work), work / "model")
    [(name, sha256)] = made.items()
    inputs = {"model.safetensors": sha256}
    return request.model_copy(update={"seed": None, "inputs": inputs}), {"model.safetensors": work / "model" / name}


def make_checkpoint(request: ShardRequest, files: dict[str, Path], directory: Path) -> Made:
    """The quantized checkpoint, as it is handed to the steps after `quantize`."""
    directory.mkdir()
    digests = Quantize().run(request, Inputs(files, directory), directory)
    return request.model_copy(update={"seed": None, "inputs": digests}), {name: directory / name for name in digests}


def run_reference(request: ShardRequest, files: dict[str, Path], work: Path, is_cast: bool) -> None:
    """The reference's part of `qualify`."""
    asked = [Asked(torch.arange(8), torch.arange(4, 8))]
    if request.schemes:
        weights = open_weights(request, files)
        StoredModel(request.hf_config, request.outline, request.schemes, weights).logits(asked)
        return
    (work / "config.json").write_text(json.dumps({**request.hf_config, **({"dtype": "bfloat16"} if is_cast else {})}))
    source = Original({"config.json": work / "config.json", **files}, work / "source").directory
    (LayeredOriginalModel(source, "model.layers") if is_cast else OriginalModel(source, "model.layers")).run(asked)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
