"""What steps read, write, and take of disk and memory, found from shapes alone: no weights are needed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from furiosa_build.backends.registry import get_backend
from furiosa_build.core.system import Disk
from furiosa_build.plan.budget.reference import LENGTHS, logits_bytes, text_bytes, working_bytes
from furiosa_build.plan.budget.sizes import nbytes, parameter_bytes, stored_bytes
from furiosa_build.plan.model import ModelPlan
from furiosa_build.plan.planner import Plan, PlannedStep
from furiosa_build.quant.scheme import scheme

if TYPE_CHECKING:
    from furiosa_build.steps.base import Work

# Private memory at the peak, measured with torch 2.13 on x86-64. It hardly depends on the model.
_WORKER = 300_000_000
"""A worker process that has imported torch and transformers, and traces."""
_PROBE = 170_000_000
"""The process that runs the artifact for `qualify`."""
_POSITIONS, _POSITIONS_OF_BUCKET = 48, 4
"""Positions whose logits `qualify` compares: of short prompts, and of those that fill a bucket."""

# Bytes on disk, rounded up from what the recipes of this project make.
_GRAPH = 20_000
_PARTS, _PARTS_OF_ROUNDED = 3, 5
"""Programs of a layer that is cut at its two all-reduces; and where activations are rounded, at their scales."""
_COPIES_OF_CONSTANTS = 4
"""Copies of a program's parameters, where it holds them: as tensors, as text in the graph, and as the compiler writes
them."""
_HEADER = 120
"""Bytes of a parameter file's header, for each tensor."""


@dataclass(frozen=True)
class SourceState:
    """How much of a model's source there is on this machine.

    Attributes:
        downloads: The disk of the hub's cache, when the weights come from there.
        cached: Bytes of the weights that the hub's cache has.
        unread: Bytes of the model's files whose digest is not known yet.
    """

    downloads: Disk | None = None
    cached: int = 0
    unread: int = 0


@dataclass(frozen=True)
class Disks:
    """The disks that the build reads and writes.

    Attributes:
        store: The disk of the store.
        output: The disk of the artifact.
        sources: The source of each model, by its id; one that is not named is there and read.
    """

    store: Disk
    output: Disk
    sources: Mapping[str, SourceState] = field(default_factory=dict)


@dataclass(frozen=True)
class Requirement:
    """The bytes that something takes, by part, and the bytes there are for it; None: nobody knows.

    `what` is a directory for a disk, else `memory`, `device`, or the device's name.
    """

    what: str
    parts: Mapping[str, int]
    available: int | None

    @property
    def needed(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether there is enough, as far as is known."""
        return self.available is None or self.needed <= self.available


class ModelCosts:
    """The sizes, in bytes, that the costs of a model's steps follow from.

    Attributes:
        model: The model.
        source: How much of its source is on this machine.
    """

    graph = _GRAPH
    """Bytes of the graphs of a supertask."""
    probe = _PROBE
    """Memory of the process that runs the artifact."""
    judge = _WORKER
    """Memory of the process that runs transformers, before it has a model."""

    def __init__(self, model: ModelPlan, source: SourceState) -> None:
        self.model, self.source = model, source
        self._backend = get_backend(model.spec.backend.name).costs

    @cached_property
    def files(self) -> int:
        """The parameter files."""
        return parameter_bytes(self.model) + _HEADER * (
            len(self.model.outline.parameters) + 2 * len(self.model.schemes)
        )

    @cached_property
    def weights(self) -> int:
        """The weights as they are published, if that is in the model's own dtype; none where they are drawn."""
        return 0 if self.model.seed is not None else self._published

    @property
    def missing(self) -> int:
        """The weights that are to be downloaded, at least."""
        return 0 if self.source.downloads is None else max(0, self._published - self.source.cached)

    @cached_property
    def largest_weight(self) -> int:
        """What is held of a parameter while it is read and written. One that is read from a file is mapped."""
        return max(
            (nbytes(parameter) if self.model.seed is not None else 0)
            + (stored_bytes(parameter, self.model.schemes[name]) if name in self.model.schemes else 0)
            for name, parameter in self.model.outline.parameters.items()
        )

    @cached_property
    def reference(self) -> int:
        """What the reference of `qualify` holds: one layer, what is in no layer, and what it computes.

        What is used as it is stored is mapped.
        """
        outline, schemes = self.model.outline, self.model.schemes
        held = {
            name: nbytes(parameter)
            for name, parameter in outline.parameters.items()
            if name in schemes or (self.model.seed is not None and not schemes)
        }
        layers = [
            sum(held.pop(f"{outline.layer_prefix}{layer}.{name}", 0) for name in kind.parameters)
            for kind in outline.blocks
            for layer in kind.layers
        ]
        return max(layers, default=0) + sum(held.values()) + self._of_reference

    @cached_property
    def _of_reference(self) -> int:
        """What the reference computes of the shortest prompts that it may be asked, and of the text."""
        outline, buckets = self.model.outline, self.model.spec.buckets
        longest = min(LENGTHS[-1], max(bucket.context for bucket in self.model.buckets))
        beams = buckets.kv_cache_sharing_across_beams_config
        positions = _POSITIONS + _POSITIONS_OF_BUCKET * len(self.model.buckets)
        positions += 0 if beams is None else _POSITIONS * beams.beam_width
        text = text_bytes(outline) if self.model.schemes else 0
        return working_bytes(outline, self.model.hf_config, longest) + max(logits_bytes(outline, positions), text)

    def constants(self, step: PlannedStep) -> int:
        """The parameters that the programs of a compile step hold."""
        if not self.model.spec.rewriting.embed_all_constants_into_graph:
            return 0
        _, kind = step.site.program
        parameters = self.model.outline.parameters
        own = self.model.parameters_of(kind).values()
        return sum(stored_bytes(parameters[name], self.model.schemes.get(name, "none")) for name in own)

    def programs(self, step: PlannedStep) -> int:
        """The programs that a compile step writes."""
        rounds = any(scheme(text).rounds_activations for text in set(self.model.schemes.values()))
        divided = _PARTS_OF_ROUNDED if rounds else _PARTS
        parts = divided if self.model.ranks > 1 else 1
        return parts * self._backend.program + self.constants(step)

    @property
    def scratch(self) -> int:
        """What a compile step writes beside its programs."""
        return self._backend.scratch

    @property
    def library(self) -> int:
        """The library that the programs call."""
        return self._backend.library

    @property
    def library_worker(self) -> int:
        """Memory of a worker that builds the library."""
        return self._backend.library_worker or _WORKER

    def compile_worker(self, step: PlannedStep) -> int:
        """Memory of a worker that compiles."""
        return (self._backend.worker or _WORKER) + _COPIES_OF_CONSTANTS * self.constants(step)

    @cached_property
    def _published(self) -> int:
        if self.model.taken:
            return parameter_bytes(self.model)
        return sum(nbytes(parameter) for parameter in self.model.outline.parameters.values())


class Costs:
    """What the steps of a plan cost, in bytes."""

    def __init__(self, plan: Plan, disks: Disks) -> None:
        self._plan, self._disks = plan, disks
        sources = disks.sources
        self._models = {id: ModelCosts(model, sources.get(id, SourceState())) for id, model in plan.models.items()}

    def of(self, step: PlannedStep) -> ModelCosts:
        """The sizes of the model that a step is for."""
        return self._models[step.model_id]

    @property
    def files(self) -> int:
        """The parameter files of the artifact, of all its models."""
        return sum(model.files for model in self._models.values())

    @property
    def is_copied(self) -> bool:
        """Whether the artifact's files are copies: it is not on the store's disk."""
        return self._disks.store.device != self._disks.output.device

    @cached_property
    def compile_worker(self) -> int:
        """Memory of one compile worker: the most that a step of the plan takes."""
        return max(s.type.worker_memory(s, self) for s in self._plan.steps.values() if s.type.worker == "compiler")

    @property
    def builder_worker(self) -> int:
        """Memory of a worker that does not compile."""
        return _WORKER

    def work(self, step: PlannedStep) -> Work:
        """What a step reads and writes."""
        return step.type.work(step, self)

    def disks(self, steps: Collection[PlannedStep], compilers: int) -> Iterator[Requirement]:
        """What is written to each file system. Hard links take no space."""
        parts: dict[int, dict[str, int]] = {}
        on: dict[int, Disk] = {}

        def add(disk: Disk, what: str, size: int) -> None:
            if size:
                on.setdefault(disk.device, disk)
                of_disk = parts.setdefault(disk.device, {})
                of_disk[what] = of_disk.get(what, 0) + size

        for kept in ("store", "output", "downloads"):
            for step in steps:
                if step.type.kept == kept:
                    add(self._disk(step), step.type.product, self.work(step).written)
            if kept == "store":
                scratch = sorted(step.type.scratch(step, self) for step in steps)
                add(self._disks.store, "the compiler's files", sum(scratch[-compilers:]))
        for device, disk in on.items():
            yield Requirement(str(disk.path), parts[device], disk.free)

    def memory(
        self, steps: Collection[PlannedStep], builders: int, compilers: int, available: int | None
    ) -> Requirement:
        """Private memory at the peak: while graphs are made and compiled, or while the artifact qualifies."""
        building = [step for step in steps if step.type.worker == "builder" and not step.type.alone]
        alone = [step for step in steps if step.type.alone]
        tracing = min(builders, len(building))
        compiling = min(compilers, sum(step.type.worker == "compiler" for step in steps))
        making = {
            "tracing": tracing * _WORKER,
            # Of each model one step at a time writes weights; those of several models may do so at the same time.
            "weights": sum(
                max((step.type.held(step, self) for step in building if step.model_id == id), default=0)
                for id in self._models
            ),
            "compiling": compiling * self.compile_worker if compiling else 0,
        }
        qualifying = {
            "workers": (max(tracing, 1) + compiling) * _WORKER,
            "qualification": max((step.type.held(step, self) for step in alone), default=0),
        }
        parts = max([making, qualifying] if alone else [making], key=lambda parts: sum(parts.values()))
        return Requirement("memory", {what: size for what, size in parts.items() if size}, available)

    def _disk(self, step: PlannedStep) -> Disk:
        """The disk that what a step writes is kept on."""
        match step.type.kept:
            case "output":
                return self._disks.output
            case "downloads":
                return self.of(step).source.downloads or self._disks.store
        return self._disks.store
