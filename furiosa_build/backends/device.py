"""Where programs run: its memory, and the parameters and KV caches in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from furiosa_build.ir.tensors import TensorSpec


class Device:
    """The host: its memory is the process's. A backend for another device, or with a layout of its own for parameters,
    overrides what differs there.
    """

    def map_parameters(self, files: Iterable[Path]) -> dict[str, Tensor]:
        """Name -> tensor, of safetensors files. The tensors lie in private mappings of the files: nothing is read."""
        tensors: dict[str, Tensor] = {}
        for file in files:
            with safe_open(file, framework="pt") as mapped:
                names = mapped.keys()
                tensors.update((name, mapped.get_tensor(name)) for name in names)
        return tensors

    def parameter(self, stored: Tensor, spec: TensorSpec) -> Tensor:
        """A mapped parameter as a program takes it that declares it as `spec`: reinterpreted bytewise, never converted.

        Raises ValueError when it is not such a parameter.
        """
        dtype = getattr(torch, spec.dtype)
        try:
            tensor = stored if stored.dtype == dtype else stored.view(dtype)
        except RuntimeError as error:
            raise ValueError(f"it is not a {spec.dtype}") from error
        if list(tensor.shape) != spec.shape:
            raise ValueError(f"it is not a {spec.dtype} {spec.shape}")
        return tensor

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A buffer of zeros. Raises RuntimeError when there is no memory for it."""
        return torch.zeros(tuple(shape), dtype=dtype)

    def num_threads(self) -> int:
        """How many threads a program may use that the calling thread runs."""
        return torch.get_num_threads()

    def limit_threads(self, number: int) -> None:
        """Programs that the calling thread runs from now on use so many threads."""
        torch.set_num_threads(number)
