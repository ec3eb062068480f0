"""The pool: results do not depend on threads, and nothing hangs, whatever else the machine does."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from furiosa_build.backends.native.library import Library, Program
from furiosa_build.backends.native.operators import OPERATORS
from furiosa_build.backends.native.pointwise import INSTRUCTIONS
from furiosa_build.backends.native.threads import ThreadPools, limit_threads, usable_cores
from tests.test_backends.test_native.calls import Call, encode, run

_DOUBLE = [INSTRUCTIONS[name].code for name in ("load", "add", "store")]


def _doubling(x: Tensor, times: int) -> list[Call]:
    """x = x + x, so many times: calls of several jobs, each of which needs the one before."""
    load, add, store = _DOUBLE
    code = [load, 0, 1, 0, 0, add, 0, 0, 0, 0, store, 0, 0, 0, 0]
    return [Call("pointwise", [x, x], [1, *code])] * times


@pytest.mark.parametrize("threads", [1, 2, 3, 16, 64])
def test_calls_are_in_order_with_any_number_of_threads(library: Library, threads: int) -> None:
    x = torch.ones(100_000)
    run(library, *_doubling(x, 100), threads=threads)
    assert torch.equal(x, torch.full_like(x, 2.0**100))


def test_results_do_not_depend_on_the_threads(library: Library) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 257, generator=generator), torch.randn(257, 301, generator=generator)
    found = []
    for threads in (1, 2, 5):
        product, share, total = torch.empty(300, 301), torch.empty(300, 301), torch.empty(300)
        calls = [
            Call("matmul", [x, y, product]),
            Call("softmax", [product, share], [0]),
            Call("reduce", [share, total], [0, 1]),
            Call("norm", [share, product, None, None, share, product], [1, 0], [1e-5, 0.0]),
        ]
        run(library, *calls, threads=threads)
        found.append((product, share, total))
    for results in found[1:]:
        for one, other in zip(found[0], results, strict=True):
            assert torch.equal(one, other)


def test_one_program_is_run_by_several_threads_at_once(library: Library) -> None:
    program, results = _program(library, 20), []
    pools = ThreadPools(library, 1, cores=2)

    def use(start: float) -> Tensor:
        for _ in range(30):
            x = torch.full((20_000,), start)
            program.run(pools.get(), [x.data_ptr()])
        return x

    with ThreadPoolExecutor(4) as executor:
        results = list(executor.map(use, [1.0, 2.0, 3.0, 4.0]))
    for start, result in enumerate(results, start=1):
        assert torch.equal(result, torch.full_like(result, start * 2.0**20))


def test_a_program_is_run_again_after_its_workers_slept(library: Library) -> None:
    program, pool = _program(library, 3), library.pool(4)
    for pause in (0.0, 0.01, 0.0, 0.03):
        x = torch.ones(20_000)
        time.sleep(pause)
        program.run(pool, [x.data_ptr()])
        assert x[0] == 8


def test_pools_end_while_their_workers_sleep_or_spin(library: Library) -> None:
    before = threading.active_count()
    for pause in (0.0, 0.0, 0.005):
        pool = library.pool(8)
        time.sleep(pause)
        del pool
    tasks = len(list(Path("/proc/self/task").iterdir()))
    pools = [library.pool(3) for _ in range(10)]
    assert len(list(Path("/proc/self/task").iterdir())) == tasks + 20
    pools.clear()
    assert len(list(Path("/proc/self/task").iterdir())) == tasks
    assert threading.active_count() == before


def test_a_pool_belongs_to_a_thread_and_ends_with_it(library: Library) -> None:
    pools, found = ThreadPools(library, concurrency=2, cores=8), []
    thread = threading.Thread(target=lambda: found.extend([id(pools.get()), id(pools.get())]))
    tasks = len(list(Path("/proc/self/task").iterdir()))
    thread.start()
    thread.join()
    assert found[0] == found[1]
    while len(list(Path("/proc/self/task").iterdir())) > tasks:  # a thread ends a little after it is joined
        time.sleep(0.001)


def test_a_thread_takes_the_number_of_threads_that_it_is_given(library: Library) -> None:
    pools, found = ThreadPools(library, concurrency=1, cores=2), []

    def use() -> None:
        before = len(list(Path("/proc/self/task").iterdir()))
        for number in (5, 5, 1, 3):
            limit_threads(number)
            pools.get()
            found.append(len(list(Path("/proc/self/task").iterdir())) - before + 1)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [5, 5, 1, 3]


def test_a_fork_runs_programs_and_ends_its_pool_without_the_workers(library: Library) -> None:
    program, pool = _program(library, 3), library.pool(4)
    x = torch.ones(20_000)
    time.sleep(0.01)
    child = os.fork()
    if child == 0:
        program.run(pool, [x.data_ptr()])
        del pool
        os._exit(0 if x[0] == 8 else 1)
    for _ in range(2000):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
    assert (ended, status) == (child, 0)


def test_cores(tmp_path: Path) -> None:
    own = len(os.sched_getaffinity(0))
    for quota, cores in (("max 100000", own), ("150000 100000", 1), ("50000 100000", 1), ("9900000 100000", own)):
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        assert usable_cores(tmp_path) == cores
    assert usable_cores(tmp_path / "none") == own


def test_the_arena_lies_behind_the_buffers(library: Library) -> None:
    x, out = torch.arange(1000.0), torch.empty(1000)
    between = encode(2, torch.empty(1000), offset=128)
    copy = OPERATORS["copy"].number
    code = [copy, 2, 0, 2, 0, 0, copy, 2, 2, 1, 0, 0]
    program = library.program([*encode(0, x), *encode(1, out), *between], code, 2, 4128)
    program.run(library.pool(2), [x.data_ptr(), out.data_ptr()])
    assert torch.equal(out, x)
    with pytest.raises(ValueError, match="1 buffers for a program of 2"):
        program.run(library.pool(1), [x.data_ptr()])


def test_no_memory_for_the_arena(library: Library) -> None:
    program = library.program([], [], 0, 2**60)
    with pytest.raises(MemoryError):
        program.run(library.pool(1), [])


def test_a_program_without_calls(library: Library) -> None:
    library.program([], [], 0, 0).run(library.pool(3), [])


def test_a_file_that_is_no_library_of_kernels(tmp_path: Path) -> None:
    (tmp_path / "none.so").write_bytes(b"\0" * 100)
    with pytest.raises(OSError, match="none"):
        Library(tmp_path / "none.so")


def _program(library: Library, times: int) -> Program:
    x = torch.empty(20_000)
    code: list[int] = []
    for call in _doubling(x, times):
        code += [OPERATORS["pointwise"].number, 2, 0, 0, len(call.ints), *call.ints, 0]
    return library.program(encode(0, x), code, 1, 0)
