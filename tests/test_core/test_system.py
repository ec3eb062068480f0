"""What a machine has: read from copies of the files of /proc and /sys, as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_build.core.system import Machine, disk_of, this_machine

MEMINFO = """\
MemTotal:       16000000 kB
MemFree:         1000000 kB
MemAvailable:    8000000 kB
SwapTotal:       3000000 kB
SwapFree:        2000000 kB
HugePages_Total:       0
"""
KB, MB = 1024, 1 << 20


def machine(root: Path, files: dict[str, str]) -> Machine:
    """The machine whose /proc and /sys/fs/cgroup hold these files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return this_machine(root / "proc", root / "cgroup")


def memory(root: Path, files: dict[str, str]) -> tuple[int | None, int | None]:
    found = machine(root, {"proc/meminfo": MEMINFO, **files})
    return found.memory, found.available


UNLIMITED = (16_000_000 * KB, 8_000_000 * KB)


def test_memory_and_swap_without_control_groups(tmp_path: Path) -> None:
    found = machine(tmp_path, {"proc/meminfo": MEMINFO})
    assert (found.memory, found.available, found.swap) == (*UNLIMITED, 2_000_000 * KB)


@pytest.mark.parametrize("meminfo", [{}, {"proc/meminfo": "MemTotal: 16000000 kB\n"}])
def test_memory_is_unknown_where_the_system_does_not_say(tmp_path: Path, meminfo: dict[str, str]) -> None:
    found = machine(tmp_path, meminfo)
    assert (found.memory, found.available) == (None, None)
    assert found.cores >= 1


def v2(directory: str, limit: str, used: int, stat: str = "") -> dict[str, str]:
    at = f"cgroup{directory}"
    return {f"{at}/memory.max": f"{limit}\n", f"{at}/memory.current": f"{used}\n", f"{at}/memory.stat": stat}


def v1(directory: str, limit: int, used: int, stat: str = "") -> dict[str, str]:
    at = f"cgroup/memory{directory}"
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    return {f"{at}/{name}": text for name, text in zip(names, (f"{limit}\n", f"{used}\n", stat), strict=True)}


IN_V2 = {"proc/self/cgroup": "0::/user/build\n"}
IN_V1 = {"proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/docker/abc\n1:cpu:/\n0::/\n"}


def test_a_limit_of_version_2(tmp_path: Path) -> None:
    assert memory(tmp_path, {**IN_V2, **v2("/user/build", str(1000 * MB), 300 * MB)}) == (1000 * MB, 700 * MB)


def test_a_limit_of_a_group_further_up_counts(tmp_path: Path) -> None:
    files = {**IN_V2, **v2("/user/build", "max", 300 * MB), **v2("/user", str(2000 * MB), 1500 * MB)}
    assert memory(tmp_path, files) == (2000 * MB, 500 * MB)


def test_the_tightest_limit_counts(tmp_path: Path) -> None:
    files = {**IN_V2, **v2("/user/build", str(1000 * MB), 100 * MB), **v2("/user", str(2000 * MB), 1900 * MB)}
    assert memory(tmp_path, files) == (1000 * MB, 100 * MB)


def test_cached_files_can_be_taken_back(tmp_path: Path) -> None:
    stat = f"anon {100 * MB}\ninactive_file {500 * MB}\nactive_file {200 * MB}\nshmem {50 * MB}\n"
    files = {**IN_V2, **v2("/user/build", str(1000 * MB), 900 * MB, stat)}
    assert memory(tmp_path, files) == (1000 * MB, 800 * MB)


def test_a_group_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    assert memory(tmp_path, {**IN_V2, **v2("/user/build", str(1000 * MB), 1100 * MB)}) == (1000 * MB, 0)


def test_no_limit(tmp_path: Path) -> None:
    assert memory(tmp_path, {**IN_V2, **v2("/user/build", "max", 300 * MB)}) == UNLIMITED


def test_a_limit_of_version_1_whose_statistics_are_the_totals(tmp_path: Path) -> None:
    stat = f"inactive_file 1\ntotal_inactive_file {100 * MB}\ntotal_active_file {50 * MB}\n"
    files = {**IN_V1, **v1("/docker/abc", 1000 * MB, 400 * MB, stat)}
    assert memory(tmp_path, files) == (1000 * MB, 750 * MB)


def test_inside_of_a_container_the_group_is_the_root(tmp_path: Path) -> None:
    assert memory(tmp_path, {**IN_V1, **v1("", 1000 * MB, 400 * MB)}) == (1000 * MB, 600 * MB)


def test_version_1_writes_a_huge_number_for_no_limit(tmp_path: Path) -> None:
    assert memory(tmp_path, {**IN_V1, **v1("/docker/abc", 9223372036854771712, 400 * MB)}) == UNLIMITED


def test_this_machine() -> None:
    found = this_machine()
    assert found.cores >= 1
    if found.memory is not None and found.available is not None:
        assert 0 < found.available <= found.memory


def test_the_disk_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there"
    found, existing = disk_of(path), disk_of(tmp_path)
    assert (found.path, found.device) == (path, existing.device)
    assert found.free is not None
    assert found.free > 0
    assert not path.parent.exists()


def test_a_file_system_without_space_of_its_own_says_nothing() -> None:
    proc = Path("/proc")
    if not (proc / "meminfo").exists():
        pytest.skip("no /proc")
    assert disk_of(proc / "not" / "there").free is None
