"""The compiled library, through its C interface (csrc/program.h)."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_int64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

_Numbers = POINTER(c_int64)
NUMBERS_OF_A_TENSOR = 20

if TYPE_CHECKING:
    Addresses = ctypes.Array[c_void_p]


class Library:
    """What is loaded stays loaded until the process ends. Raises OSError when `path` is not a library of kernels."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path.absolute()))
        try:
            self._declare()
        except AttributeError as error:
            raise OSError(f"{path} is not a library of kernels: {error}") from error

    def pool(self, threads: int) -> Pool:
        """A pool of threads, the calling one of a run among them."""
        handle = self._functions.furiosa_pool_create(threads)
        if handle is None:
            raise OSError(f"no {threads} threads: the system has no more")
        return Pool(handle, self._functions)

    def program(self, tensors: Sequence[int], code: Sequence[int], num_buffers: int, arena_bytes: int) -> Program:
        """A program, as csrc/program.h describes its numbers. They are trusted."""
        handle = self._functions.furiosa_program_create(
            _array(tensors), len(tensors) // NUMBERS_OF_A_TENSOR, _array(code), len(code), num_buffers, arena_bytes
        )
        return Program(handle, num_buffers, self._functions)

    def limit_cpu(self, limit: int) -> None:
        """Programs made from now on use less of a processor: 1 no AMX, 2 no dot products, 3 AVX2, 0 all. For tests."""
        self._functions.furiosa_limit_cpu(limit)

    def _declare(self) -> None:
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "pool_create": (c_void_p, [c_int64]),
            "pool_destroy": (None, [c_void_p]),
            "program_create": (c_void_p, [_Numbers, c_int64, _Numbers, c_int64, c_int64, c_int64]),
            "program_destroy": (None, [c_void_p]),
            "program_run": (c_int64, [c_void_p, c_void_p, POINTER(c_void_p)]),
            "limit_cpu": (None, [c_int64]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self._functions, f"furiosa_{name}")
            function.restype = result
            function.argtypes = arguments


class Pool:
    """Threads that run programs: of one thread at a time."""

    def __init__(self, handle: int, functions: ctypes.CDLL) -> None:
        self.handle = handle
        weakref.finalize(self, functions.furiosa_pool_destroy, handle).atexit = False  # it may be running then


class Program:
    """A list of calls, ready to run. Several threads may run it at the same time, each with a pool of its own."""

    def __init__(self, handle: int, num_buffers: int, functions: ctypes.CDLL) -> None:
        self._handle = handle
        self._num_buffers = num_buffers
        self._run = functions.furiosa_program_run
        weakref.finalize(self, functions.furiosa_program_destroy, handle).atexit = False

    def run(self, pool: Pool, buffers: Sequence[int] | Addresses) -> None:
        """Runs on the buffers at these addresses. Raises MemoryError when there is no memory for what lies between."""
        if len(buffers) != self._num_buffers:
            raise ValueError(f"{len(buffers)} buffers for a program of {self._num_buffers}")
        given = buffers if isinstance(buffers, ctypes.Array) else addresses(buffers)
        if self._run(self._handle, pool.handle, given) != 0:
            raise MemoryError("no memory for a program's arena")


def addresses(numbers: Sequence[int]) -> Addresses:
    """Addresses that can be changed from run to run."""
    return (c_void_p * len(numbers))(*numbers)


def _array(numbers: Sequence[int]) -> ctypes.Array[c_int64]:
    return (c_int64 * len(numbers))(*numbers)
