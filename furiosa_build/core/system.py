"""What this machine has for a build: processor cores, memory, free disk. Limits of control groups count."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))


@dataclass(frozen=True)
class Machine:
    """Bytes of memory; None where the system does not say.

    Attributes:
        cores: Processor cores that this process may run on.
        memory: All there is for this process.
        available: What can be had now without swapping; pages of files that are cached count as free.
        swap: What can be swapped out besides.
    """

    cores: int
    memory: int | None
    available: int | None
    swap: int = 0


@dataclass(frozen=True)
class Disk:
    """The file system of `path`, which need not exist yet: its number, and the bytes that this user may still write.

    None where it does not say.
    """

    path: Path
    device: int
    free: int | None


def this_machine(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Machine:
    """The machine that this process runs on."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    found = dict(_numbers(proc / "meminfo", scale=1024))
    memory, available = found.get("MemTotal:"), found.get("MemAvailable:")
    if memory is None or available is None:
        return Machine(cores, None, None)
    for limit, used in _limits(proc, cgroups):
        memory, available = min(memory, limit), min(available, max(0, limit - used))
    return Machine(cores, memory, available, found.get("SwapFree:", 0))


def disk_of(path: Path) -> Disk:
    """The disk of a path that need not exist yet."""
    nearest = next(place for place in (path, *path.parents) if place.exists())
    usage = shutil.disk_usage(nearest)
    return Disk(path, nearest.stat().st_dev, usage.free if usage.total else None)


def _limits(proc: Path, cgroups: Path) -> Iterator[tuple[int, int]]:
    """(limit, used and not reclaimable) in bytes, of every memory control group that this process is in."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        (limit, usage, reclaimable), root = (_V1, cgroups / "memory") if controllers else (_V2, cgroups)
        # Inside of a container the path may be that of the host; the container's own group is then at the root.
        group = root / path.lstrip("/")
        for directory in (group, *group.parents):
            with suppress(OSError, ValueError):  # no such group, or no limit: `max`
                limited = int((directory / limit).read_text())
                cached = sum(size for name, size in _numbers(directory / "memory.stat") if name in reclaimable)
                yield limited, max(0, int((directory / usage).read_text()) - cached)
            if directory == root:
                break


def _numbers(path: Path, scale: int = 1) -> Iterator[tuple[str, int]]:
    """The lines `NAME NUMBER ...` of a file."""
    with suppress(OSError):
        for line in path.read_text().splitlines():
            name, number, *_ = [*line.split(), "", ""]
            if number.isdigit():
                yield name, int(number) * scale
