"""Where programs run: its memory, its tensors, and what the runtime does with these between programs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from furiosa_build.backends.chain import Chain, Link, ProgramByProgram
from furiosa_build.ir.tensors import Layout, TensorSpec

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Device(ABC, Generic[T]):
    """A device and its tensors, all of them contiguous: what `T` is, only the device and its programs know.

    numpy has no bfloat16: its arrays hold the bits, as uint16.
    """

    @abstractmethod
    def map_parameters(self, files: Iterable[Path]) -> dict[str, T]:
        """Name -> tensor, of safetensors files. The tensors lie in private mappings of the files: nothing is read."""

    @abstractmethod
    def parameter(self, stored: T, spec: TensorSpec) -> T:
        """A mapped parameter as a program takes it that declares it as `spec`: reinterpreted bytewise, never converted.

        Raises ValueError when it is not such a parameter.
        """

    @abstractmethod
    def allocate(self, layout: Layout) -> T:
        """A tensor of zeros. Raises MemoryError when there is no memory for it."""

    def allocate_kv_cache(self, layout: Layout) -> T:
        """A new KV cache of zeros, [slots, ...], with at least as many slots. Raises MemoryError."""
        return self.allocate(layout)

    @abstractmethod
    def layout(self, tensor: T) -> Layout:
        """Its dtype and shape."""

    @abstractmethod
    def from_numpy(self, array: NDArray[Any]) -> T:
        """A tensor in the memory of an array of int64."""

    @abstractmethod
    def to_numpy(self, tensor: T) -> NDArray[Any]:
        """An array in the memory of a tensor of floating-point numbers."""

    @abstractmethod
    def from_torch(self, tensor: torch.Tensor) -> T:
        """A tensor in the memory of one of torch's: of a collective between processes."""

    @abstractmethod
    def to_torch(self, tensor: T) -> torch.Tensor:
        """The inverse of `from_torch`."""

    @abstractmethod
    def sum(self, parts: Sequence[T]) -> T:
        """The sum, in order, of several tensors of one layout, each partial one rounded: a new tensor."""

    @abstractmethod
    def concatenate(self, parts: Sequence[T]) -> T:
        """Several tensors of one layout side by side along the last dimension: a new tensor."""

    @abstractmethod
    def num_threads(self) -> int:
        """How many threads a program may use that the calling thread runs."""

    @abstractmethod
    def limit_threads(self, number: int) -> None:
        """Programs that the calling thread runs from now on use so many threads."""

    def chain(self, links: Sequence[Link], results: Sequence[str]) -> Chain:
        """Programs that run one after the other, ready to run; a run gives the tensors called `results`.

        Raises ValueError when a program is handed what it does not take.
        """
        return ProgramByProgram(links, results)

    def running(self) -> AbstractContextManager[object]:
        """A context in which the calling thread runs programs."""
        return nullcontext()


def as_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """What a device gives as an array of float32, float16 or bfloat16 -> float32, of any shape, exactly."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)  # bfloat16 is the upper half of a float32
    return array.astype(np.float32, copy=False)
