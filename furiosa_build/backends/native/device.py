"""Parameters as the library takes them: where they were mapped, in its layout."""

from __future__ import annotations

from torch import Tensor

from furiosa_build.backends.device import Device
from furiosa_build.backends.native.packing import packed_layout
from furiosa_build.backends.native.threads import limit_threads, usable_cores
from furiosa_build.ir.tensors import Layout, TensorSpec


class NativeDevice(Device):
    """The host, whose parameters were packed when they were partitioned."""

    def parameter(self, stored: Tensor, spec: TensorSpec) -> Tensor:
        packed = packed_layout(Layout(spec.dtype, tuple(size or 0 for size in spec.shape)))
        of_packed = spec.model_copy(update={"dtype": packed.dtype, "shape": list(packed.shape)})
        return super().parameter(stored, of_packed)

    def num_threads(self) -> int:
        return usable_cores()

    def limit_threads(self, number: int) -> None:
        super().limit_threads(number)
        limit_threads(number)
