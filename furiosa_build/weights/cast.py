"""Weights in the dtype of the model, which must be able to hold them."""

from __future__ import annotations

import torch
from torch import Tensor

from furiosa_build.core.errors import UserError


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor called `name` in a floating point dtype. Raises UserError when a number becomes infinite."""
    result = tensor.to(dtype)
    if not tensor.is_floating_point() or torch.finfo(tensor.dtype).max <= torch.finfo(dtype).max:
        return result
    lost = result.isinf() & tensor.isfinite()
    if lost.any():
        at = tuple(int(index) for index in lost.nonzero()[0])
        short = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{short} cannot hold the weights: {name}{list(at)} is {float(tensor[at]):g} "
            f"({int(lost.sum())} of {lost.numel()} numbers are too large)",
            where="config.json, dtype",
            valid=f"numbers up to {torch.finfo(dtype).max:g} for {short}",
            hint=f"set dtype of config.json to {str(tensor.dtype).removeprefix('torch.')}, as the weights are stored, "
            "or to bfloat16 or float32",
        )
    return result
