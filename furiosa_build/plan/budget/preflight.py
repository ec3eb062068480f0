"""The figures of a build before it begins, and whether this machine and the target have what it takes.

A pure function of the plan and of facts that are passed in. Refused is what cannot be: bytes that must be written and
have no place on the disk; memory that nobody else can use meanwhile and that not even swapping provides. For a step
that may turn out to be up to date nothing is refused. Pages of mapped files need no place in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from furiosa_build.core.system import Machine
from furiosa_build.plan.budget.costs import Costs, Disks, Requirement
from furiosa_build.plan.budget.durations import Durations, total_seconds
from furiosa_build.plan.budget.placement import placement
from furiosa_build.plan.budget.sizes import SCRATCH_BLOCKS
from furiosa_build.plan.kv_blocks import element_memory
from furiosa_build.plan.planner import Plan, PlannedStep
from furiosa_build.recipe.schema import BuildOptions

if TYPE_CHECKING:
    from furiosa_build.steps.base import Work


@dataclass(frozen=True)
class Shortage:
    """A requirement that is not met, and what to do about it."""

    requirement: Requirement
    remedy: str


@dataclass(frozen=True)
class Preflight:
    """The figures of a build. Bytes and seconds.

    Attributes:
        work: What each step that is to do reads and writes.
        disks: What is written to each file system.
        memory: Private memory at the peak, and what is available without swapping.
        device: What the artifact takes of one device's memory; of an NPU's element, which has its share of it.
        device_is_host: The device's memory is that of this machine, since the target does not say how much it has.
        compile_workers: Programs that are compiled at a time: as many as were asked for, or as the memory allows.
        compile_worker: Memory that each of these takes.
        programs: How many are to be compiled.
        seconds: What all of it takes, as far as is known.
        unknown_times: Kinds of step that are not part of `seconds`.
        shortages: Why the build is refused; none: it is not.
    """

    work: Mapping[str, Work]
    disks: tuple[Requirement, ...]
    memory: Requirement
    device: Requirement
    device_is_host: bool
    compile_workers: int
    compile_worker: int
    programs: int
    seconds: float
    unknown_times: tuple[str, ...]
    shortages: tuple[Shortage, ...]

    @property
    def read(self) -> int:
        """Bytes that all steps read."""
        return sum(work.read for work in self.work.values())

    @property
    def written(self) -> int:
        """Bytes that all steps write."""
        return sum(work.written for work in self.work.values())


def preflight(
    plan: Plan,
    options: BuildOptions,
    undone: Mapping[str, bool],
    disks: Disks,
    machine: Machine,
    durations: Durations,
) -> Preflight:
    """The figures.

    Args:
        plan: The steps.
        options: How many workers were asked for.
        undone: The steps that are to do; False for one that may yet turn out to be up to date.
        disks: The disks that the build reads and writes.
        machine: What there is.
        durations: How long steps took before.
    """
    steps = [plan.steps[name] for name in undone]
    certain = [plan.steps[name] for name, is_certain in undone.items() if is_certain]
    costs, builders = Costs(plan, disks), options.num_pipeline_builder_workers
    workers = _affordable_workers(costs, options, steps, machine)
    device, is_host = _device(plan, machine)
    estimates = [(step, durations.estimate(step, plan)) for step in steps]
    unknown = (step.type.label for step, seconds in estimates if seconds is None)
    known = [(step, seconds) for step, seconds in estimates if seconds is not None]
    return Preflight(
        work={step.name: costs.work(step) for step in steps},
        disks=tuple(costs.disks(steps, workers)),
        memory=costs.memory(steps, builders, workers, machine.available),
        device=device,
        device_is_host=is_host,
        compile_workers=workers,
        compile_worker=costs.compile_worker,
        programs=sum(step.type.worker == "compiler" and step.kind is not None for step in steps),
        seconds=total_seconds(known, min(builders, machine.cores), min(workers, machine.cores)),
        unknown_times=tuple(dict.fromkeys(unknown)),
        shortages=(
            *_disk_shortages(plan, costs.disks(certain, 1)),
            *_memory_shortages(costs, certain, machine),
            *(_device_shortages(plan, device, is_host, machine) if "package" in undone else ()),
        ),
    )


_MORE_DISK = {
    "parameters": "make room (`furiosa-build cache gc`), or cache_dir=DIRECTORY on a larger disk",
    "a copy for the artifact": "save_dir=DIRECTORY on the store's disk, where no copy is made, or on a larger one",
    "download": "HF_HUB_CACHE=DIRECTORY on a larger disk",
}


def _disk_shortages(plan: Plan, disks: Iterator[Requirement]) -> Iterator[Shortage]:
    for need in disks:
        if not need.fits:
            remedies = [remedy for what, remedy in _MORE_DISK.items() if what in need.parts]
            if "parameters" in need.parts and not plan.model.schemes:
                remedies.append("quantization=fp8")
            yield Shortage(need, "; ".join(remedies) or _MORE_DISK["parameters"])


def _affordable_workers(costs: Costs, options: BuildOptions, steps: Collection[PlannedStep], machine: Machine) -> int:
    """The number of compile workers that memory allows: at least one, at most what was asked for."""
    builders, asked = options.num_pipeline_builder_workers, options.num_compile_workers
    if not any(step.type.worker == "compiler" for step in steps):
        return asked
    fitting = (n for n in range(asked, 1, -1) if costs.memory(steps, builders, n, machine.available).fits)
    return next(fitting, 1)


def _memory_shortages(costs: Costs, steps: Collection[PlannedStep], machine: Machine) -> Iterator[Shortage]:
    """Memory that is missing even with one worker of each kind. Fewer workers or swapping are slow, but not refused."""
    available = None if machine.available is None else machine.available + machine.swap
    need = costs.memory(steps, 1, 1, available)
    if not need.fits:
        yield Shortage(need, "end what else uses the memory, or build on a machine that has more")


def _device(plan: Plan, machine: Machine) -> tuple[Requirement, bool]:
    """What the artifact takes of a device, or of an element that has its share of one; whether it is this machine."""
    target, share = plan.model.spec.target, element_memory(plan.model.spec)
    on: dict[str, dict[str, int]] = {}
    for element in placement(plan):
        # Replicas on a host map the same files.
        parameters = element.parameters if target.memory_gb is not None or not element.replica else 0
        parts = on.setdefault(element.device if share is None else element.name, {"parameters": 0, "KV cache": 0})
        parts["parameters"] += parameters
        parts["KV cache"] += element.kv_cache
    parts = max(on.values(), key=lambda parts: sum(parts.values()))
    if share is not None:
        return Requirement("element", parts, share), False
    if target.memory_gb is not None:
        return Requirement("device", parts, int(target.memory_gb * 1e9)), False
    is_host = target.isa == "native" and machine.memory is not None
    return Requirement("device", parts, machine.memory if is_host else None), is_host


def _device_shortages(plan: Plan, device: Requirement, is_host: bool, machine: Machine) -> Iterator[Shortage]:
    """A device holds parameters and KV cache. A host maps the parameters: there only the KV cache has to fit."""
    if device.available is None:
        return
    parts, room = dict(device.parts), device.available
    if is_host:
        del parts["parameters"]
        room += machine.swap
    whole = "an element" if device.what == "element" else "a device"
    need = Requirement("this machine" if is_host else f"{whole} of target {plan.model.spec.target.name}", parts, room)
    if need.fits:
        return
    count, more = plan.kv_blocks.count, "a device with more memory (target.memory_gb)"
    if device.what == "element":
        more = f"more elements (parallel.tensor_parallel_size, parallel.pipeline_parallel_size), or {more}"
    left, block = room - parts.get("parameters", 0), parts["KV cache"] // (count + SCRATCH_BLOCKS)
    blocks = max(0, left // block - SCRATCH_BLOCKS)
    if blocks >= plan.model.spec.buckets.least_blocks:
        remedy = f"buckets.paged_attention_num_blocks={blocks} or less ({count} now), or smaller "
        remedy += "buckets.decode_buckets"
    elif blocks:
        remedy = f"shorter buckets.decode_buckets, or {more}"
    else:
        smaller = "" if plan.model.schemes else "quantization=fp8, or "
        remedy = f"{smaller}{more}"
    yield Shortage(need, remedy)
