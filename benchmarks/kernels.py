"""How near the native kernels come to what the machine can do: `python benchmarks/kernels.py [K N] [NAMES]`.

Products by format and rows of activations, in percent of the rate at which memory is read (few rows) or of the rate of
the instruction that multiplies (many rows). Times are processor time of one thread. The limit is measured between the
runs of each kernel and the best of both are compared, so that a busy machine disturbs the shares little.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from furiosa_build.backends.native.build_library import build_library
from furiosa_build.backends.native.emit_linear import FORMATS
from furiosa_build.backends.native.library import Library
from furiosa_build.backends.native.operators import OPERATORS
from furiosa_build.backends.native.packing import pack

ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
READ_ROWS = 8
"""Up to this many rows, the share is that of the read rate."""
MEMORY = 256 << 20
"""Bytes of weights that runs go through: more than caches hold."""


class Kind(NamedTuple):
    """The format of the weight, the dtype of x, and the limit of products."""

    format: str
    x: torch.dtype
    limit: str
    group_size: int = 0


KINDS = {
    "float32": Kind("float32", torch.float32, "multiply_floats"),
    "bfloat16": Kind("bfloat16", torch.bfloat16, "multiply_bfloats"),
    "float16": Kind("float16", torch.float16, "multiply_floats"),
    "int8": Kind("int8", torch.bfloat16, "multiply_bfloats"),
    "int8-dynamic": Kind("int8", torch.int8, "multiply_int8"),
    "fp8": Kind("fp8", torch.bfloat16, "multiply_bfloats"),
    "int4": Kind("int4", torch.bfloat16, "multiply_bfloats", 128),
    "int4-32": Kind("int4", torch.bfloat16, "multiply_bfloats", 32),
    "int4-dynamic": Kind("int4", torch.int8, "multiply_int8", 128),
}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 6, torch.uint8: 7, torch.float8_e4m3fn: 7}


def main(k: int, n: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        build_library(work / "kernels.so", Path(tempfile.gettempdir()) / "furiosa-build-benchmark-objects")
        library, limits = Library(work / "kernels.so"), compile_limits(work)
        memory = torch.ones(MEMORY // 8, dtype=torch.int64)
        print(f"K={k} N={n}: % of the read rate for up to {READ_ROWS} rows, then of the rate of multiplications")
        print(f"{'':14}{'GB/s':>6}{'GFLOP/s':>9}" + "".join(f"{rows:>6}" for rows in ROWS))
        for name in names:
            kind = KINDS[name]
            weights = make_weights(kind, n, k)
            shares, best = [], {True: 0.0, False: 0.0}
            for rows in ROWS:
                run = make_run(library, kind, weights, rows, n)
                reads = rows <= READ_ROWS
                done = weights[0].nbytes if reads else 2 * rows * n * k
                limit, rate = 0.0, 0.0
                for _ in range(6):
                    limit = max(limit, read_rate(limits, memory) if reads else multiply_rate(limits, kind.limit))
                    runs = len(weights) if reads else 2
                    rate = max(rate, done * runs / seconds(lambda: [run(i) for i in range(runs)]))  # noqa: B023
                shares.append(100 * rate / limit)
                best[reads] = max(best[reads], limit)
            print(
                f"{name:14}{best[True] / 1e9:6.1f}{best[False] / 1e9:9.0f}" + "".join(f"{s:6.0f}" for s in shares),
                flush=True,
            )


def compile_limits(work: Path) -> ctypes.CDLL:
    """benchmarks/limits.cpp, for this machine."""
    source, library = Path(__file__).parent / "limits.cpp", work / "limits.so"
    subprocess.run(["g++", "-std=c++17", "-O2", "-march=native", "-shared", "-fPIC", source, "-o", library], check=True)
    limits = ctypes.CDLL(str(library))
    limits.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    for name in {kind.limit for kind in KINDS.values()}:
        getattr(limits, name).argtypes = [ctypes.c_int64]
        getattr(limits, name).restype = ctypes.c_int64
    return limits


def read_rate(limits: ctypes.CDLL, memory: Tensor) -> float:
    """Bytes a second."""
    return memory.nbytes / seconds(lambda: limits.read_all(memory.data_ptr(), memory.nbytes))


def multiply_rate(limits: ctypes.CDLL, name: str) -> float:
    """Multiplications and additions a second; where the processor has no such instruction, those of floats."""
    function = getattr(limits, name)
    if function(0) == 0:
        function = limits.multiply_floats
    rounds = 2_000_000
    return 2 * 12 * rounds * int(function(0)) / seconds(lambda: function(rounds))


def seconds(function: Callable[[], object]) -> float:
    """Processor time of this thread."""
    begin = time.thread_time()
    function()
    return time.thread_time() - begin


def make_weights(kind: Kind, n: int, k: int) -> list[Tensor]:
    """Packed weights: enough of them that none is in the cache when its turn comes."""
    drawn = torch.randn(n, k)
    if kind.group_size:
        packed = pack(torch.randint(0, 256, (n, k // 2)).to(torch.uint8))
    elif kind.format in ("int8", "fp8"):
        drawn = (drawn * 30).clamp(-127, 127)
        packed = pack(drawn.to(torch.int8 if kind.format == "int8" else torch.float8_e4m3fn))
    else:
        packed = pack(drawn.to(getattr(torch, kind.format)))
    return [packed.clone() for _ in range(max(2, MEMORY // packed.nbytes))]


def make_run(library: Library, kind: Kind, weights: list[Tensor], rows: int, n: int) -> Callable[[int], None]:
    """A function that multiplies with one of the weights, in this thread."""
    size = kind.group_size
    k = weights[0].shape[1] * (8 if size else 4 // weights[0].itemsize)
    x = (torch.randn(rows, k) * 10).to(kind.x)
    out = torch.empty(rows, n, dtype=torch.bfloat16 if kind.x is torch.int8 else kind.x)
    scale = pack(torch.ones(n, k // size, dtype=torch.bfloat16)) if size else torch.ones(n)
    tensors = [x, torch.ones(rows), weights[0], scale, out]
    of_weight = [3 if size or kind.format in ("int8", "fp8") else -1, *([-1] if size else [])]
    operands = [0, 1 if kind.x is torch.int8 else -1, 2, *of_weight, -1, -1, 4]
    numbers = [number for index, tensor in enumerate(tensors) for number in describe(index, tensor)]
    operator = OPERATORS["linear_groups" if size else "linear"].number
    code = [operator, len(operands), *operands, 1, size or FORMATS[kind.format], 0]
    program, pool = library.program(numbers, code, len(tensors), 0), library.pool(1)
    buffers = [[(weight if t is weights[0] else t).data_ptr() for t in tensors] for weight in weights]
    return lambda index, _alive=tensors: program.run(pool, buffers[index])  # type: ignore[misc]


def describe(buffer: int, tensor: Tensor) -> list[int]:
    """A tensor as programs describe it (csrc/program.h)."""
    padding = [0] * (8 - tensor.dim())
    return [buffer, 0, DTYPES[tensor.dtype], tensor.dim(), *tensor.shape, *padding, *tensor.stride(), *padding]


if __name__ == "__main__":
    sizes = [int(word) for word in sys.argv[1:] if word.isdigit()] or [2048, 8192]
    main(*sizes, [word for word in sys.argv[1:] if not word.isdigit()] or list(KINDS))
