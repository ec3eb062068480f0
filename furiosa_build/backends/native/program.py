"""A plan, loaded: ready to run on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from furiosa_build.backends.native import tensors
from furiosa_build.backends.native.check import check_plan
from furiosa_build.backends.native.encode import encode
from furiosa_build.backends.native.library import Library, Program
from furiosa_build.backends.native.packing import GROUP_SLOTS
from furiosa_build.backends.native.plan import Plan
from furiosa_build.backends.native.tensors import HostTensor
from furiosa_build.backends.native.threads import ThreadPools
from furiosa_build.ir.tensors import Layout


class NativeProgram:
    """A program whose calls one call of the library runs, without Python's lock.

    Args:
        plan: What it does. Raises ValueError when something in it could reach outside its buffers.
        library: The file of the kernels.
        concurrency: How many threads run programs at the same time; each has its share of the cores.

    Attributes:
        library: The kernels, loaded.
        pools: The threads that run them.
        constants: The plan's.
        sizes: Of each input, in bytes; None of a KV cache.
        outputs: The layout of each output.
    """

    def __init__(self, plan: Plan, library: Path, concurrency: int) -> None:
        check_plan(plan)
        self.plan = plan
        self.library, self.pools = _library(library.resolve(), concurrency)
        self.constants = _aligned(plan.constants_blob)
        self.sizes = [spec.nbytes for spec in plan.inputs]
        self.outputs = [Layout(spec.dtype, tuple(size or 0 for size in spec.shape)) for spec in plan.outputs]

    def run(self, inputs: Sequence[HostTensor]) -> list[HostTensor]:
        """Raises ValueError for inputs that are not as large as the plan says."""
        for given, size in zip(inputs, self.sizes, strict=True):
            check_size(given, size)
        outputs = [tensors.empty(layout) for layout in self.outputs]
        buffers = [tensor.address for tensor in (*inputs, *outputs, self.constants)]
        self._program.run(self.pools.get(), buffers)
        return outputs

    @cached_property
    def _program(self) -> Program:
        """What is run alone: a chain joins the plan with others."""
        views, code = encode(self.plan)
        return self.library.program(views, code, self.plan.num_buffers, self.plan.arena)


def check_size(given: HostTensor, size: int | None) -> None:
    """Raises ValueError when an input is not of `size` bytes; None: when a KV cache is not of whole groups of slots."""
    if size is None:
        if given.layout.shape[0] % GROUP_SLOTS:
            raise ValueError(f"a KV cache has {given.layout.shape[0]} slots, not a multiple of {GROUP_SLOTS}")
    elif given.nbytes != size:
        raise ValueError(f"an input of {size} bytes is given as {given.layout}")


@cache
def _library(path: Path, concurrency: int) -> tuple[Library, ThreadPools]:
    library = Library(path)
    return library, ThreadPools(library, concurrency)


def _aligned(blob: bytes) -> HostTensor:
    """The bytes, where a tensor of them begins as it does in the blob."""
    memory = tensors.empty(Layout("uint8", (len(blob),)))
    memory.array[:] = np.frombuffer(blob, dtype=np.uint8)
    return memory
