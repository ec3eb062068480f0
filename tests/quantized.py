"""Checkpoints quantized by compressed-tensors itself: nothing of this project has a hand in them."""

from __future__ import annotations

import os
from contextlib import redirect_stderr
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from loguru import logger
from test_models.tiny import load

FORMS = [
    f"{kind}{tensor}{dynamic}"
    for kind in ("fp8", "int8", "int8-plain")
    for tensor in ("", "-tensor")
    for dynamic in ("", "-dynamic")
]
"""All there are."""


def library_scheme(form: str) -> QuantizationScheme:
    """What compressed-tensors calls the scheme that this project writes as the text `form`."""
    family, *words = form.split("-")
    if family == "int4":
        weights = QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=int(words[0]))
        return QuantizationScheme(targets=["Linear"], weights=weights, format="pack-quantized")
    numbers = "float" if family == "fp8" else "int"
    stored = "float-quantized" if family == "fp8" else "int-quantized" if "plain" in words else "pack-quantized"
    weights = QuantizationArgs(num_bits=8, type=numbers, strategy="tensor" if "tensor" in words else "channel")
    activations = QuantizationArgs(num_bits=8, type=numbers, strategy="token", dynamic=True)
    inputs = activations if "dynamic" in words else None
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs, format=stored)


def save_quantized(model: Path, directory: Path, form: str, dtype: torch.dtype = torch.float32) -> Path:
    """Quantizes all linear layers of the model in a directory but its head. Returns `directory`."""
    scheme = library_scheme(form)
    logger.disable("compressed_tensors")
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # progress bars
        quantized = load(model, dtype)
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, format=scheme.format, ignore=["lm_head"], quantization_status="frozen"
        )
        apply_quantization_config(quantized, config, show_progress=False)
        for module in quantized.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                weight = module.weight.data
                if "int4" in form:  # a scale for each group of columns
                    weight = weight.unflatten(1, (-1, scheme.weights.group_size))
                low, high = (
                    (weight.amin(), weight.amax())
                    if "tensor" in form
                    else weight.aminmax(dim=-1, keepdim="int4" not in form)
                )
                module.weight_scale.data, _ = calculate_qparams(low, high, scheme.weights)
        compressor = ModelCompressor.from_pretrained_model(quantized, scheme.format)
        compressor.compress_model(quantized)
        quantized.save_pretrained(directory)
        compressor.update_config(str(directory))
    return directory
