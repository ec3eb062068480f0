"""Weights drawn from a seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from furiosa_build.ir.outline import ParameterOutline
from furiosa_build.ir.tensors import Layout

_DRAW = 1 << 22
"""Random numbers drawn at a time, so that memory stays bounded."""


class RandomSource:
    """Weights drawn from `seed`: a tensor depends on the seed and its own name and shape alone.

    Vectors called weight (norms) are near one, all else is normal with variance 1 / fan-in.
    """

    def __init__(self, parameters: Mapping[str, ParameterOutline], seed: int) -> None:
        self._parameters, self._seed = parameters, seed

    def names(self) -> set[str]:
        return set(self._parameters)

    def layout(self, name: str) -> Layout:
        return self._parameters[name].layout

    def read(self, name: str) -> Tensor:
        outline = self._parameters[name]
        key = hashlib.sha256(f"{self._seed} {name} {outline.shape}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
        tensor = torch.empty(outline.shape, dtype=getattr(torch, outline.dtype))
        is_vector = len(outline.shape) == 1
        scale = 0.02 if is_vector else outline.shape[-1] ** -0.5
        offset = 1.0 if is_vector and name.endswith("weight") else 0.0
        flat = tensor.view(-1)
        for begin in range(0, math.prod(outline.shape), _DRAW):
            part = flat[begin : begin + _DRAW]
            part.copy_(torch.from_numpy(generator.standard_normal(part.numel(), dtype=np.float32) * scale + offset))
        return tensor
