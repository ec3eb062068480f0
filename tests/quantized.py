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

from furiosa_build.quant.forms import Form

FORMS = [
    f"{kind}{tensor}{dynamic}"
    for kind in ("fp8", "int8", "int8-plain")
    for tensor in ("", "-tensor")
    for dynamic in ("", "-dynamic")
]
"""All there are."""


def save_quantized(model: Path, directory: Path, form: str, dtype: torch.dtype = torch.float32) -> Path:
    """Quantizes all linear layers of the model in a directory but its head. Returns `directory`."""
    kind, plain, tensor, dynamic = Form.parse(form)
    numbers = "float" if kind == "fp8" else "int"
    stored = "float-quantized" if kind == "fp8" else "int-quantized" if plain else "pack-quantized"
    weights = QuantizationArgs(num_bits=8, type=numbers, strategy="tensor" if tensor else "channel")
    activations = QuantizationArgs(num_bits=8, type=numbers, strategy="token", dynamic=True) if dynamic else None
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations, format=stored)
    logger.disable("compressed_tensors")
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):  # progress bars
        quantized = load(model, dtype)
        config = QuantizationConfig(
            config_groups={"group_0": scheme}, format=stored, ignore=["lm_head"], quantization_status="frozen"
        )
        apply_quantization_config(quantized, config, show_progress=False)
        for module in quantized.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                weight = module.weight.data
                low, high = (weight.amin(), weight.amax()) if tensor else weight.aminmax(dim=1, keepdim=True)
                module.weight_scale.data, _ = calculate_qparams(low, high, weights)
        compressor = ModelCompressor.from_pretrained_model(quantized, stored)
        compressor.compress_model(quantized)
        quantized.save_pretrained(directory)
        compressor.update_config(str(directory))
    return directory
