"""A plan, loaded: ready to run on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from furiosa_build.backends.native.check import check_plan
from furiosa_build.backends.native.encode import encode
from furiosa_build.backends.native.library import Library
from furiosa_build.backends.native.plan import ALIGNMENT, Plan
from furiosa_build.backends.native.threads import ThreadPools


class NativeProgram:
    """A program whose calls one call of the library runs, without Python's lock.

    Args:
        plan: What it does. Raises ValueError when something in it could reach outside its buffers.
        library: The file of the kernels.
        concurrency: How many threads run programs at the same time; each has its share of the cores.
    """

    def __init__(self, plan: Plan, library: Path, concurrency: int) -> None:
        check_plan(plan)
        functions, self._pools = _library(library.resolve(), concurrency)
        tensors, code = encode(plan)
        self._program = functions.program(tensors, code, plan.num_buffers, plan.arena)
        self._constants = _aligned(plan.constants_blob)
        self._sizes = [spec.nbytes for spec in plan.inputs]
        self._outputs = [([size or 0 for size in spec.shape], getattr(torch, spec.dtype)) for spec in plan.outputs]

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Raises ValueError for inputs that are not as large as the plan says, or not contiguous."""
        for given, size in zip(inputs, self._sizes, strict=True):
            if (size is not None and given.nbytes != size) or not given.is_contiguous():
                raise ValueError(f"an input of {size} bytes is given as {given.dtype} {list(given.shape)}")
        outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in self._outputs]
        buffers = [tensor.data_ptr() for tensor in (*inputs, *outputs, self._constants)]
        self._program.run(self._pools.get(), buffers)
        return outputs


@cache
def _library(path: Path, concurrency: int) -> tuple[Library, ThreadPools]:
    library = Library(path)
    return library, ThreadPools(library, concurrency)


def _aligned(blob: bytes) -> Tensor:
    """The bytes, where a tensor of them begins as it does in the blob. At least one, so that there is an address."""
    memory = torch.zeros(len(blob) + ALIGNMENT, dtype=torch.uint8)
    begin = -memory.data_ptr() % ALIGNMENT
    if blob:
        memory[begin : begin + len(blob)] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    return memory[begin:]
