"""Weight-only quantization, one symmetric scale per output channel, and its compressed-tensors description.

What others have quantized may have other forms: they are checked and dequantized here as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.forms import Form
from furiosa_build.quant.linear import FP8, FP8_MAX, INT8_MAX, INT8_ZERO, number_type, packed_columns, scale_shape

_ELEMENTS_AT_A_TIME = 1 << 18
"""Turned into float32 at a time: a large matrix needs little more memory than its result, and the processor's caches
hold what is computed on."""

_FORMATS = {"fp8": ("float-quantized", "float"), "int8": ("pack-quantized", "int")}


def stored_layouts(name: str, layout: Layout, scheme: str) -> dict[str, Layout]:
    """What a linear layer's weight [out, in] becomes in a checkpoint, by parameter name."""
    if scheme == "none":
        return {name: layout}
    form, (rows, columns) = Form.parse(scheme), layout.shape
    module = name.removesuffix(".weight")
    scale = {f"{module}.weight_scale": Layout(layout.dtype, scale_shape(form, rows))}
    if not form.is_packed:
        return {f"{module}.weight": Layout(str(number_type(form)).removeprefix("torch."), (rows, columns)), **scale}
    packed = Layout("int32", (rows, packed_columns(columns) // 4))
    return {f"{module}.weight_packed": packed, f"{module}.weight_shape": Layout("int64", (2,)), **scale}


def quantize(name: str, weight: Tensor, scheme: str) -> dict[str, Tensor]:
    """weight: [out, in] -> the tensors of `stored_layouts`. Values are rounded to nearest, ties to even."""
    if scheme == "none":
        return {name: weight}
    rows, columns = weight.shape
    module = name.removesuffix(".weight")
    scale = torch.empty((rows, 1), dtype=weight.dtype)
    padded = packed_columns(columns) if scheme == "int8" else columns
    stored = torch.empty((rows, padded), dtype=FP8 if scheme == "fp8" else torch.uint8)
    with _one_thread():
        for part in _parts(rows, columns):
            _quantize_rows(weight[part].float(), stored[part], scale[part])
    if scheme == "fp8":
        return {f"{module}.weight": stored, f"{module}.weight_scale": scale}
    return {
        f"{module}.weight_packed": stored.view(torch.int32),
        f"{module}.weight_shape": torch.tensor([rows, columns]),
        f"{module}.weight_scale": scale,
    }


def dequantize(stored: Mapping[str, Tensor], scheme: str) -> Tensor:
    """The inverse of `quantize`, up to its rounding: [out, in] in the scale's dtype. `stored` has relative names."""
    scale = stored["weight_scale"]
    if not Form.parse(scheme).is_packed:
        weight, zero = stored["weight"], 0
    else:
        weight, zero = stored["weight_packed"].view(torch.uint8)[:, : int(stored["weight_shape"][1])], INT8_ZERO
    scale = scale.reshape(-1, 1).expand(len(weight), 1)
    result = torch.empty(weight.shape, dtype=scale.dtype)
    with _one_thread():
        for part in _parts(*weight.shape):
            result[part] = (weight[part].float() - zero) * scale[part].float()
    return result


def compressed_tensors_config(scheme: str, ignored_modules: list[str]) -> dict[str, Any]:
    """`quantization_config` for config.json, as compressed-tensors 0.1x reads it."""
    name, kind = _FORMATS[scheme]
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
                "format": name,
            }
        },
        "ignore": ignored_modules,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch computes in this thread alone: 2 GB/s, more than disks write.

    Threads would meet after every operation on a part: on idle cores twice as fast, on busy ones 20 times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _parts(rows: int, columns: int) -> Iterator[slice]:
    """All rows, in slices that are small enough to be worked on."""
    step = max(1, _ELEMENTS_AT_A_TIME // columns)
    return (slice(begin, begin + step) for begin in range(0, rows, step))


def _quantize_rows(weight: Tensor, stored: Tensor, scale: Tensor) -> None:
    largest = weight.abs().amax(dim=1, keepdim=True)
    limit = FP8_MAX if stored.dtype == FP8 else float(INT8_MAX)
    scale.copy_(torch.where(largest > 0, largest / limit, 1.0).clamp_min(torch.finfo(scale.dtype).tiny))
    # The scale is rounded to the model's dtype first: what is stored is what the weight is divided by.
    values = (weight / scale.float()).clamp_(-limit, limit)
    if stored.dtype == FP8:
        stored.copy_(values)
    else:
        stored.fill_(INT8_ZERO)
        stored[:, : values.shape[1]] = (values.round_() + INT8_ZERO).to(torch.uint8)
