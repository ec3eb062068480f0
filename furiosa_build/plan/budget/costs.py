"""What steps read, write, and take of disk and memory, found from shapes alone: no weights are needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from furiosa_build.backends.registry import get_backend
from furiosa_build.core.system import Disk
from furiosa_build.plan.budget.sizes import nbytes, parameter_bytes, stored_bytes
from furiosa_build.plan.kinds import outer_parameters
from furiosa_build.plan.planner import Plan, Step
from furiosa_build.quant.scheme import scheme

# Private memory at the peak, measured with torch 2.13 on x86-64. It hardly depends on the model.
_WORKER = 300_000_000
"""A worker process that has imported torch and transformers, and traces."""
_PROBE = 170_000_000
"""The process that runs the artifact for `qualify`."""

# Bytes on disk, rounded up from what the recipes of this project make.
_GRAPH = 20_000
_PARTS, _PARTS_OF_ROUNDED = 3, 5
"""Programs of a layer that is cut at its two all-reduces; and where activations are rounded, at their scales."""
_COPIES_OF_CONSTANTS = 4
"""Of a program's parameters, where it holds them: as tensors, as text in the graph, and as the compiler writes them."""
_HEADER = 120
"""Of a parameter file, for each tensor."""


@dataclass(frozen=True)
class Places:
    """Where the build reads and writes.

    Attributes:
        store: The disk of the store.
        output: That of the artifact.
        downloads: That of the hub's cache, when the weights come from there.
        cached: Bytes of the weights that the hub's cache has.
        unread: Bytes of the model's files whose digest is not known yet.
        draft: The same for the draft model, if there is one.
    """

    store: Disk
    output: Disk
    downloads: Disk | None = None
    cached: int = 0
    unread: int = 0
    draft: Places | None = None


@dataclass(frozen=True)
class Work:
    """What a step reads and writes of weights and programs, in bytes."""

    read: int = 0
    written: int = 0


@dataclass(frozen=True)
class Need:
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


class Costs:
    """What the steps of a plan cost, in bytes."""

    def __init__(self, plan: Plan, places: Places) -> None:
        self._plan, self._places = plan, places
        self._draft = None if plan.draft is None else Costs(plan.draft, places.draft or places)
        self._backend = get_backend(plan.spec.backend.name).costs
        self._schemes = plan.schemes()
        self._writes_checkpoint = plan.writes_checkpoint
        self._drawn = plan.spec.model.seed_for_random_weight is not None

    @cached_property
    def compile_worker(self) -> int:
        """Memory of one compile worker."""
        constants = max(self._constants(step) for step in self._own(self._plan.steps.values()))
        own = (self._backend.worker or _WORKER) + _COPIES_OF_CONSTANTS * constants
        return own if self._draft is None else max(own, self._draft.compile_worker)

    def work(self, step: Step) -> Work:
        """What a step reads and writes."""
        plan, of_plan = self._plan.origin(step)
        if self._draft is not None and plan is self._plan.draft:
            return self._draft.work(of_plan)
        source = 0 if self._drawn else self._source
        match step.action:
            case "fetch":
                return Work(self._places.unread + self._missing, self._missing)
            case "quantize" if self._writes_checkpoint:
                return Work(source, self._files)
            case "shard" if not self._writes_checkpoint:
                return Work(source, self._files)
            case "shard" if self._plan.spec.parallel.is_divided:
                return Work(self._files, self._files)
            case "trace":
                return Work(0, _GRAPH)
            case "compile":
                rounded = any(scheme(text).rounds_activations for text in set(self._schemes.values()))
                divided = _PARTS_OF_ROUNDED if rounded else _PARTS
                parts = divided if self._plan.spec.parallel.tensor_parallel_size > 1 else 1
                constants = self._constants(step)
                return Work(_GRAPH + constants, parts * self._backend.program + constants)
            case "package" if self._places.store.device != self._places.output.device:
                return Work(self._all_files, self._all_files)
            case "qualify":
                return Work(self._all_files + (self._files if self._schemes else source))
        return Work()

    def disks(self, steps: Collection[Step], compilers: int) -> Iterator[Need]:
        """What is written to each file system. Hard links take no space."""
        written: Counter[str] = Counter()
        scratch = []
        places, on = self._places, dict[int, Disk]()
        parts: dict[int, dict[str, int]] = {}

        def add(disk: Disk, what: str, size: int) -> None:
            if size:
                on.setdefault(disk.device, disk)
                of_disk = parts.setdefault(disk.device, {})
                of_disk[what] = of_disk.get(what, 0) + size

        for step in steps:
            written[step.action] += self.work(step).written
            if step.action == "compile":
                scratch.append(get_backend(self._plan.origin(step)[0].spec.backend.name).costs.scratch)
        add(places.store, "parameters", written["quantize"] + written["shard"])
        add(places.store, "programs", written["trace"] + written["compile"])
        add(places.store, "the compiler's files", sum(sorted(scratch)[-compilers:]))
        add(places.output, "a copy for the artifact", written["package"])
        for step in steps:
            if step.action == "fetch":
                of = places if self._plan.origin(step)[0] is self._plan else places.draft or places
                add(of.downloads or of.store, "download", self.work(step).written)
        for device, disk in on.items():
            yield Need(str(disk.path), parts[device], disk.free)

    def memory(self, steps: Collection[Step], builders: int, compilers: int, available: int | None) -> Need:
        """Private memory at the peak: while graphs are made and compiled, or while the artifact qualifies."""
        count = Counter(step.action for step in steps)
        tracing = min(builders, count["quantize"] + count["shard"] + count["trace"])
        compiling = min(compilers, count["compile"])
        making = {
            "tracing": tracing * _WORKER,
            "weights": self._weights(steps),
            "compiling": compiling * self.compile_worker,
        }
        qualifying = {
            "workers": (max(tracing, 1) + compiling) * _WORKER,
            "qualification": max(_PROBE, self._reference),
        }
        peaks = [making, qualifying] if count["qualify"] else [making]
        parts = max(peaks, key=lambda parts: sum(parts.values()))
        return Need("memory", {what: size for what, size in parts.items() if size}, available)

    def _weights(self, steps: Collection[Step]) -> int:
        """What is held of the weights while they are written; the draft's may be at the same time."""
        writes = "quantize" if self._writes_checkpoint else "shard"
        own = self._own(steps)
        held = self._largest_weight if any(step.action == writes for step in own) else 0
        return held + (0 if self._draft is None else self._draft._weights([s for s in steps if s not in own]))

    def _own(self, steps: Collection[Step]) -> list[Step]:
        """Those that are not of the draft model."""
        return [step for step in steps if self._plan.origin(step)[0] is self._plan]

    def _constants(self, step: Step) -> int:
        """Of the parameters that the programs of a compile step hold."""
        if (
            step.action != "compile"
            or step.kind is None
            or not self._plan.spec.rewriting.embed_all_constants_into_graph
        ):
            return 0
        outline = self._plan.outline
        own = set(outer_parameters(step.kind.segment, outline))
        for layer, block in zip(step.kind.segment.layers, step.kind.blocks, strict=True):
            own.update(f"{outline.layer_prefix}{layer}.{name}" for name in block.outline.parameters)
        return sum(stored_bytes(outline.parameters[name], self._schemes.get(name, "none")) for name in own)

    @cached_property
    def _parameters(self) -> int:
        """Of the parameters in the artifact, without the headers of their files."""
        return parameter_bytes(self._plan)

    @cached_property
    def _files(self) -> int:
        """Of the parameter files."""
        return self._parameters + _HEADER * (len(self._plan.outline.parameters) + 2 * len(self._schemes))

    @property
    def _all_files(self) -> int:
        """Of all parameter files of the artifact."""
        return self._files + (0 if self._draft is None else self._draft._files)

    @cached_property
    def _source(self) -> int:
        """Of the weights as they are published, if that is in the model's own dtype."""
        if self._plan.checkpoint is not None:
            return self._parameters
        return sum(nbytes(parameter) for parameter in self._plan.outline.parameters.values())

    @property
    def _missing(self) -> int:
        """Of the weights to be downloaded, at least."""
        return 0 if self._places.downloads is None else max(0, self._source - self._places.cached)

    @cached_property
    def _largest_weight(self) -> int:
        """What is held of a parameter while it is read and written. One that is read from a file is mapped."""
        return max(
            (nbytes(parameter) if self._drawn else 0)
            + (stored_bytes(parameter, self._schemes[name]) if name in self._schemes else 0)
            for name, parameter in self._plan.outline.parameters.items()
        )

    @cached_property
    def _reference(self) -> int:
        """What `qualify` holds of the model: one layer, and what is no layer. What is used as stored is mapped."""
        outline = self._plan.outline
        held = {
            name: nbytes(parameter)
            for name, parameter in outline.parameters.items()
            if name in self._schemes or (self._drawn and not self._schemes)
        }
        layers = [
            sum(held.pop(f"{outline.layer_prefix}{layer}.{name}", 0) for name in kind.parameters)
            for kind in outline.blocks
            for layer in kind.layers
        ]
        return max(layers, default=0) + sum(held.values())
