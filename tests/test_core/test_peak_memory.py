from __future__ import annotations

import ctypes
import gc
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from alone import alone

from furiosa_build.core import peak_memory
from furiosa_build.core.peak_memory import Usage, Watch, give_back, usage

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells private memory from mapped files")

MIB = 2**20
SIZE = 64 * MIB
SLACK = 16 * MIB
"""What the interpreter and its libraries may take or give back meanwhile."""

CHILD = f"data = bytearray(b'x') * {SIZE}; print('ready', flush=True); input()"


def now() -> Usage:
    found = usage(os.getpid())
    assert found is not None
    return found


def peak_of(watch: Watch) -> Usage:
    assert watch.peak is not None
    return watch.peak


@contextmanager
def child() -> Iterator[int]:
    """A process with SIZE bytes of private memory."""
    with subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.communicate(b"\n")


@pytest.fixture(autouse=True)
def _without_garbage() -> None:
    """What other tests have left would be freed while memory is watched."""
    gc.collect()


@linux
@alone
def test_what_is_allocated_is_private() -> None:
    before = now()
    with Watch() as watch:
        data = bytearray(b"x") * SIZE
    del data
    assert SIZE <= peak_of(watch).private - before.private < SIZE + SLACK
    assert peak_of(watch).mapped - before.mapped < SLACK


@linux
def test_what_is_mapped_is_not_private(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * SIZE)
    before = now()
    with Watch() as watch, file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[::4096].count(b"x") == SIZE // 4096
        # Within, so that the last sample is not the only one that can see it.
        while peak_of(watch).mapped - before.mapped < SIZE:
            pass
    assert peak_of(watch).private - before.private < SLACK
    assert peak_of(watch).mapped - before.mapped < SIZE + SLACK


@linux
@alone
def test_a_peak_is_kept_when_the_memory_is_given_back() -> None:
    before = now()
    with Watch() as watch:
        data = bytearray(b"x") * SIZE
        while peak_of(watch).private - before.private < SIZE:
            pass
        del data
        assert now().private - before.private < SLACK
    assert peak_of(watch).private - before.private >= SIZE


@linux
def test_of_other_processes_only_its_own_children_count_and_only_if_wanted() -> None:
    before = now()
    with child():
        with Watch() as alone:
            pass
        with Watch(children=True) as together:
            pass
    with Watch(children=True) as later:
        pass
    assert peak_of(alone).private - before.private < SLACK
    assert peak_of(together).private - before.private >= SIZE
    assert peak_of(later).private - before.private < SLACK


@linux
@alone
def test_children_of_children_count() -> None:
    before = now()
    shell = f'"{sys.executable}" -c "{CHILD}"; true'
    with subprocess.Popen(["sh", "-c", shell], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with Watch(children=True) as watch:
            pass
        process.communicate(b"\n")
    assert peak_of(watch).private - before.private >= SIZE


@linux
def test_another_process_is_asked_by_its_id() -> None:
    with child() as pid:
        found = usage(pid)
    assert found is not None
    assert found.private >= SIZE
    assert usage(pid) is None, "it has ended"


@linux
def test_the_watch_ends_with_its_block() -> None:
    with pytest.raises(ZeroDivisionError), Watch() as watch:
        _ = 1 / 0
    peak = watch.peak
    data = bytearray(b"x") * SIZE
    assert not watch._thread.is_alive()
    assert watch.peak == peak
    del data


def test_where_the_system_does_not_tell_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "_PROC", tmp_path)
    with Watch(children=True) as watch:
        pass
    assert watch.peak is None
    process = tmp_path / str(os.getpid())
    process.mkdir()
    (process / "status").write_text("Name:\tpython\nVmRSS:\t1 kB\n")  # as of a process that has ended, or an old kernel
    assert usage(os.getpid()) is None


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library gives back by itself")
def test_freed_memory_goes_back_to_the_system() -> None:
    blocks = [bytearray(b"x") * 65536 for _ in range(SIZE // 65536)]
    pins = [bytearray(b"x") * 65536 for _ in range(16)]  # above them: the heap cannot simply shrink
    full = now().private
    del blocks
    give_back()
    assert full - now().private > SIZE // 2
    del pins
