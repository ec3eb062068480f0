"""The host as the library sees it: parameters where they were mapped, in its layout, and memory of the process."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from furiosa_build.backends.chain import Chain, Link
from furiosa_build.backends.device import Device
from furiosa_build.backends.native import tensors
from furiosa_build.backends.native.packing import GROUP_SLOTS, packed_layout
from furiosa_build.backends.native.tensors import HostTensor
from furiosa_build.backends.native.threads import limit_threads, usable_cores
from furiosa_build.core.safetensors_header import DTYPES, read_header
from furiosa_build.ir.tensors import Layout, TensorSpec

if TYPE_CHECKING:
    import torch


class NativeDevice(Device[HostTensor]):
    """The host, whose parameters were packed when they were partitioned. It does without torch."""

    def map_parameters(self, files: Iterable[Path]) -> dict[str, HostTensor]:
        """Raises ValueError for a file that is not of safetensors."""
        found: dict[str, HostTensor] = {}
        for path in files:
            header = read_header(path)
            with path.open("rb") as file:
                begin = 8 + int.from_bytes(file.read(8), "little")
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            memory = np.frombuffer(mapping, dtype=np.uint8)
            for name, entry in header.items():
                first, last = (begin + offset for offset in entry["data_offsets"])
                layout = Layout(DTYPES[entry["dtype"]], tuple(entry["shape"]))
                found[name] = tensors.of_bytes(memory[first:last], layout)
        return found

    def parameter(self, stored: HostTensor, spec: TensorSpec) -> HostTensor:
        packed = packed_layout(Layout(spec.dtype, tuple(size or 0 for size in spec.shape)))
        own = stored.layout.shape
        if stored.nbytes != packed.nbytes or (len(own), own[:-1]) != (len(packed.shape), packed.shape[:-1]):
            raise ValueError(f"it is not a {packed.dtype} {list(packed.shape)}")
        return stored if stored.layout == packed else stored.view(packed)

    def allocate(self, layout: Layout) -> HostTensor:
        return tensors.zeros(layout)

    def allocate_kv_cache(self, layout: Layout) -> HostTensor:
        """With whole groups of slots."""
        slots, *others = layout.shape
        return self.allocate(Layout(layout.dtype, (-(-slots // GROUP_SLOTS) * GROUP_SLOTS, *others)))

    def layout(self, tensor: HostTensor) -> Layout:
        return tensor.layout

    def from_numpy(self, array: NDArray[Any]) -> HostTensor:
        return HostTensor(array, Layout(str(array.dtype), array.shape))

    def to_numpy(self, tensor: HostTensor) -> NDArray[Any]:
        return tensor.array

    def from_torch(self, tensor: torch.Tensor) -> HostTensor:
        import torch

        memory = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return tensors.of_bytes(memory, Layout.of(tensor))

    def to_torch(self, tensor: HostTensor) -> torch.Tensor:
        import torch

        memory = torch.from_numpy(tensor.array.reshape(-1).view(np.uint8))
        return memory.view(getattr(torch, tensor.layout.dtype)).reshape(tensor.layout.shape)

    def sum(self, parts: Sequence[HostTensor]) -> HostTensor:
        return tensors.sum_of(parts)

    def concatenate(self, parts: Sequence[HostTensor]) -> HostTensor:
        return tensors.concatenate(parts)

    def chain(self, links: Sequence[Link], results: Sequence[str]) -> Chain:
        from furiosa_build.backends.native.chain import NativeChain

        return NativeChain(links, results)

    def num_threads(self) -> int:
        return usable_cores()

    def limit_threads(self, number: int) -> None:
        limit_threads(number)
