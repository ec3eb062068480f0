"""Prints as JSON how much private memory (MiB) steps take at their peak, for a model of 2 layers and for one of 16.

A process of its own: `python peak_of_step.py DIRECTORY`. Memory that a step leaves behind can make what follows seem to
take more, never the other way round, since all that is small comes first.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from furiosa_build.core.peak_memory import Watch, give_back
from furiosa_build.ir.outline import Outline
from furiosa_build.models.analyze import survey
from furiosa_build.steps import qualify, quantize, shard
from furiosa_build.weights.listing import Source

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
)
"""Step, quantization, and where the weights come from: drawn from a seed, or files, which are mapped."""


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
    request = make_request(scheme, source, config, outline, work)
    if step != "quantize" and scheme != "none":
        request["checkpoint"] = make_checkpoint(request, work / "checkpoint")
    (work / "output").mkdir()
    give_back()
    with Watch() as watch:
        if step == "qualify":
            compare_with_noise(request, work)
        else:
            import_module(f"furiosa_build.steps.{step}").run(request, work / "output")
    assert watch.peak is not None
    return watch.peak.private / 2**20


def make_request(scheme: str, source: str, config: dict[str, Any], outline: Outline, work: Path) -> dict[str, Any]:
    request = {
        "source": Source(seed=0, parameters=outline.parameters).model_dump(),
        "directory": "",
        "outline": outline.model_dump(),
        "hf_config": config,
        "schemes": {n: scheme for n, p in outline.parameters.items() if p.linear and scheme != "none"},
        "checkpoint": {},
        "taken": False,
        "ranks": 1,
        "stages": [sorted(layer for block in outline.blocks for layer in block.layers)],
    }
    if source == "files":
        (work / "model").mkdir()
        shard.run(request, work / "model")
        next((work / "model").iterdir()).rename(work / "model" / "model.safetensors")
        request |= {"source": Source().model_dump(), "directory": str(work / "model")}
    return request


def make_checkpoint(request: dict[str, Any], directory: Path) -> dict[str, dict[str, str]]:
    """The quantized checkpoint, as it is handed to the steps after `quantize`."""
    directory.mkdir()
    digests = quantize.run(request, directory)
    return {name: {"path": str(directory / name), "sha256": sha256} for name, sha256 in digests.items()}


def compare_with_noise(request: dict[str, Any], work: Path) -> None:
    """The reference's part of `qualify`: to find that the logits are not the model's it has to compute all layers."""
    probed = work / "probed.safetensors"
    save_file({"tokens.0": torch.arange(8), "logits.0": torch.full((4, CONFIG["vocab_size"]), 1e6)}, probed)
    try:
        qualify.compare(probed, request, work / "output")
    except RuntimeError as error:
        if "logits are not the model's" in str(error):
            return
        raise
    raise AssertionError("the reference has not computed logits")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
