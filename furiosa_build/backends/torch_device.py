"""The host, with tensors of torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from furiosa_build.backends.device import Device
from furiosa_build.ir.tensors import Layout, TensorSpec


class TorchDevice(Device[Tensor]):
    """The host: its memory is the process's. A backend with a layout of its own for parameters overrides what differs
    there.
    """

    def map_parameters(self, files: Iterable[Path]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in files:
            with safe_open(file, framework="pt") as mapped:
                names = mapped.keys()
                tensors.update((name, mapped.get_tensor(name)) for name in names)
        return tensors

    def parameter(self, stored: Tensor, spec: TensorSpec) -> Tensor:
        dtype = getattr(torch, spec.dtype)
        try:
            tensor = stored if stored.dtype == dtype else stored.view(dtype)
        except RuntimeError as error:
            raise ValueError(f"it is not a {spec.dtype}") from error
        if list(tensor.shape) != spec.shape:
            raise ValueError(f"it is not a {spec.dtype} {spec.shape}")
        return tensor

    def allocate(self, layout: Layout) -> Tensor:
        try:
            return torch.zeros(layout.shape, dtype=getattr(torch, layout.dtype))
        except RuntimeError as error:
            raise MemoryError(str(error)) from error

    def layout(self, tensor: Tensor) -> Layout:
        return Layout.of(tensor)

    def from_numpy(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array)

    def to_numpy(self, tensor: Tensor) -> NDArray[Any]:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(np.uint16)
        array: NDArray[Any] = tensor.numpy()
        return array

    def from_torch(self, tensor: Tensor) -> Tensor:
        return tensor

    def to_torch(self, tensor: Tensor) -> Tensor:
        return tensor

    def sum(self, parts: Sequence[Tensor]) -> Tensor:
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        return total

    def concatenate(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=-1)

    def num_threads(self) -> int:
        return torch.get_num_threads()

    def limit_threads(self, number: int) -> None:
        torch.set_num_threads(number)

    def running(self) -> AbstractContextManager[object]:
        return torch.inference_mode()
