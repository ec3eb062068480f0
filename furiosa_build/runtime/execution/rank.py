"""One rank of one stage of an artifact: its parameters mapped, its KV caches allocated, its supertasks bound.

What can be settled before the first step is: parameters and KV caches of every supertask, and which follow one another
without a collective in between. A step gives such a chain its activations, and runs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.artifact.schema import Pipeline, Program, Supertask
from furiosa_build.backends.base import Backend, LoadedProgram
from furiosa_build.backends.chain import Chain, Link, read_by
from furiosa_build.backends.device import Device
from furiosa_build.backends.registry import get_backend
from furiosa_build.core.errors import UserError
from furiosa_build.ir.dtypes import ITEMSIZE
from furiosa_build.ir.tensors import Layout, TensorSpec
from furiosa_build.runtime.execution.communicator import Communicator
from furiosa_build.runtime.execution.input_buffers import InputBuffers, Row

LOGITS = "logits"
LAST_HIDDEN_STATE = "last_hidden_state"


class StepOutputs(NamedTuple):
    """What a run of a bucket gives, for each row and each of its tokens, or for the last of them only.

    Attributes:
        logits: In the program's dtype, of bfloat16 the bits as uint16: [batch_size, query_length, vocab], or
            [batch_size, 1, vocab].
        last_hidden_state: What they are made of: [batch_size, query_length, hidden_size], or [batch_size, 1,
            hidden_size]; None where the bucket does not give it.
    """

    logits: NDArray[Any]
    last_hidden_state: NDArray[Any] | None = None


class RankRunner:
    """One rank of one stage: the programs with its own parameters and KV caches.

    Args:
        opened: The artifact.
        num_slots: Slots of each layer's KV caches. They start as zeros: what is masked still takes part in
            products, and 0 * NaN is NaN: the rows of padding read what they have not written.
        programs: File and entry of a program -> the program, loaded.
        communicator: Its end, which says which rank of which stage this is.
        parameters: Those of this rank, where another replica has mapped them; None: they are mapped.

    Raises:
        UserError: Parameters, programs and pipelines do not fit together, or the caches do not fit into
        memory.
    """

    def __init__(
        self,
        opened: OpenArtifact,
        num_slots: int,
        programs: Mapping[ProgramKey, LoadedProgram],
        communicator: Communicator,
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        self._opened = opened
        self._communicator = communicator
        self.stage, self.rank = communicator.stage, communicator.rank
        self._device = device_of(opened)
        self.parameters = self._map_parameters() if parameters is None else parameters
        self.num_slots = num_slots
        self._kv_caches = self._allocate_kv_caches()
        self._programs = programs
        self._pipelines = {pipeline.name: self._bind(pipeline) for pipeline in opened.artifact.pipelines}

    def run(self, pipeline: str, rows: Sequence[Row]) -> StepOutputs | None:
        """Runs this rank's part of one bucket.

        Args:
            pipeline: Its name.
            rows: At most batch_size; the bucket is filled up with padding that writes to the scratch block
                only.

        Returns:
            In the last stage: what the bucket gives.
        """
        bound = self._pipelines[pipeline]
        bound.inputs.fill(rows)
        tensors = dict(bound.inputs.tensors)
        with self._device.running():
            if bound.received:
                tensors.update(self._communicator.receive(bound.received, self._device))
            for task in bound.tasks:
                if isinstance(task, _BoundCollective):
                    self._join(task, tensors)
                    for name in task.last_used:
                        del tensors[name]
                else:
                    given = {name: tensors[name] for name in task.reads}
                    for name in task.last_used:
                        del tensors[name]
                    tensors.update(task.chain.run(given))
        if LOGITS not in tensors:
            return None
        hidden_state = tensors.get(LAST_HIDDEN_STATE)
        to_numpy = self._device.to_numpy
        return StepOutputs(to_numpy(tensors[LOGITS]), None if hidden_state is None else to_numpy(hidden_state))

    def outputs_of(self, pipeline: str) -> StepOutputs:
        """Arrays like those that a bucket gives."""
        logits, hidden_state = self._pipelines[pipeline].outputs
        return StepOutputs(self._like(logits), None if hidden_state is None else self._like(hidden_state))

    def _like(self, layout: Layout) -> NDArray[Any]:
        return self._device.to_numpy(self._device.allocate(layout))

    def _map_parameters(self) -> Mapping[str, Any]:
        place = (self.stage, self.rank)
        groups = [group for group in self._opened.artifact.parameters if (group.stage, group.rank) == place]
        return self._device.map_parameters(self._opened.path(file) for group in groups for file in group.files)

    def _allocate_kv_caches(self) -> dict[tuple[int, str], Any]:
        caches = {}
        try:
            for spec in (spec for spec in self._opened.artifact.kv_cache if spec.stage == self.stage):
                for name, shape in spec.shapes.items():
                    layout = Layout(_dtype(spec.dtype), (self.num_slots, *shape))
                    caches[spec.layer, name] = self._device.allocate_kv_cache(layout)
        except MemoryError as error:
            raise UserError(
                f"no memory for KV caches of {self.num_slots} tokens",
                where="paged_attention_num_blocks",
                hint="lower paged_attention_num_blocks",
            ) from error
        return caches

    def _join(self, task: _BoundCollective, tensors: dict[str, Any]) -> None:
        if task.op == "send":
            self._communicator.send({name: tensors[name] for name in task.reads}, self._device)
        else:
            join = getattr(self._communicator, task.op)
            [tensors[task.outputs[0]]] = [join(tensors[name], self._device) for name in task.reads]

    def _bind(self, pipeline: Pipeline) -> _BoundPipeline:
        fed = InputBuffers(pipeline, self._device, self.rank)
        shapes = self._shapes(pipeline)
        known, received = set(fed.tensors), {}
        tasks: list[Link | _BoundCollective] = []
        for number, supertask in enumerate(pipeline.supertasks):
            where = f"pipelines[{pipeline.name!r}].supertasks[{number}]"
            self._check_place(supertask, where)
            if supertask.kind == "comm" and supertask.op == "send" and supertask.stage == self.stage - 1:
                received = {name: shapes[name] for name in supertask.outputs}
                known.update(received)
            if supertask.stage != self.stage or self.rank not in supertask.ranks:
                continue
            tasks.append(self._bind_supertask(supertask, known, where))
            if supertask.op != "send":
                known.update(supertask.outputs)
        last = pipeline.supertasks[-1] if pipeline.supertasks else None
        if last is None or LOGITS not in last.outputs or not _RESULTS.issuperset(last.outputs):
            raise self._error("its last supertask does not give `logits`", f"pipelines[{pipeline.name!r}]")
        bound = self._bind_chains(tasks, f"pipelines[{pipeline.name!r}]")
        return _BoundPipeline(fed, received, bound, (shapes[LOGITS], shapes.get(LAST_HIDDEN_STATE)))

    def _bind_chains(
        self, tasks: Sequence[Link | _BoundCollective], where: str
    ) -> list[_BoundChain | _BoundCollective]:
        """The programs between collectives become one chain, which gives what is needed after it."""
        bound: list[_BoundChain | _BoundCollective] = []
        needed = set(_RESULTS)
        for group in reversed(_between_collectives(tasks)):
            if isinstance(group, _BoundCollective):
                reads, made = set(group.reads), set() if group.op == "send" else set(group.outputs)
                group.last_used = sorted((reads | made) - needed)
                bound.append(group)
            else:
                reads, made = read_by(group), {name for link in group for name in link.outputs}
                try:
                    chain = self._device.chain(group, sorted(made & needed))
                except ValueError as error:
                    raise self._error(str(error), where) from error
                bound.append(_BoundChain(chain, sorted(reads), sorted(reads - needed)))
            needed = (needed - made) | reads
        return bound[::-1]

    def _check_place(self, supertask: Supertask, where: str) -> None:
        parallel = self._opened.artifact.parallel_config
        if not 0 <= supertask.stage < parallel.pipeline_parallel_size:
            raise self._error(f"there is no stage {supertask.stage}", where)
        if supertask.ranks != list(range(parallel.tensor_parallel_size)):
            raise self._error(f"it is for ranks {supertask.ranks}, not for all of a stage", where)

    def _shapes(self, pipeline: Pipeline) -> dict[str, Layout]:
        """The layout of each tensor that a program of the pipeline gives."""
        shapes: dict[str, Layout] = {}
        for supertask in pipeline.supertasks:
            if supertask.kind == "comp":
                outputs = self._program_of(supertask, "").outputs
                for name, spec in zip(supertask.outputs, outputs, strict=False):
                    shapes[name] = Layout(_dtype(spec.dtype), tuple(n or 0 for n in spec.shape))
            elif supertask.op in ("all_reduce", "all_gather") and shapes.keys() >= set(supertask.inputs.values()):
                part = next(shapes[name] for name in supertask.inputs.values())
                side_by_side = len(supertask.ranks) if supertask.op == "all_gather" else 1
                size = (*part.shape[:-1], part.shape[-1] * side_by_side)
                shapes[supertask.outputs[0]] = Layout(part.dtype, size)
        return shapes

    def _program_of(self, supertask: Supertask, where: str) -> Program:
        program = self._opened.artifact.programs.get(supertask.program or "")
        if program is None:
            raise self._error(f"there is no program {supertask.program!r}", where)
        return program

    def _bind_supertask(self, supertask: Supertask, known: set[str], where: str) -> Link | _BoundCollective:
        if missing := sorted(set(supertask.inputs.values()) - known):
            raise self._error(f"nothing gives tensor {missing[0]!r}", where)
        if supertask.kind == "comm":
            if supertask.op is None or (
                supertask.op != "send" and (len(supertask.inputs), len(supertask.outputs)) != (1, 1)
            ):
                raise self._error("a comm supertask joins one tensor into one", where)
            return _BoundCollective(supertask.op, list(supertask.inputs.values()), supertask.outputs)
        program = self._program_of(supertask, where)
        if len(program.outputs) != len(supertask.outputs):
            raise self._error(f"program {supertask.program!r} has {len(program.outputs)} outputs", where)
        inputs: list[Any] = []
        for spec in program.inputs:
            if spec.role == "activation":
                name = supertask.inputs.get(spec.name, "")
                if name not in known:
                    raise self._error(f"nothing gives tensor {name!r} for input {spec.name!r}", where)
                inputs.append(name)
            elif spec.role == "parameter":
                inputs.append(self._parameter(supertask, spec, where))
            else:
                inputs.append(self._kv_cache(supertask, spec, where))
        return Link(self._programs[program.file, program.entry], inputs, supertask.outputs)

    def _parameter(self, supertask: Supertask, spec: TensorSpec, where: str) -> Any:
        name = spec.name
        if spec.block is not None:
            prefix = self._opened.artifact.model_metadata.layer_prefix
            name = f"{prefix}{self._layer(supertask, spec, where)}.{name}"
        tensor = self.parameters.get(name)
        if tensor is None:
            raise self._error(f"no parameter file of stage {self.stage}, rank {self.rank} has {name!r}", where)
        _dtype(spec.dtype)
        try:
            return self._device.parameter(tensor, spec)
        except ValueError as error:
            layout = self._device.layout(tensor)
            stored = f"{layout.dtype} {list(layout.shape)}"
            raise self._error(f"parameter {name!r} is stored as {stored}: {error}", where) from error

    def _layer(self, supertask: Supertask, spec: TensorSpec, where: str) -> int:
        if spec.block is None or not 0 <= spec.block < len(supertask.layers):
            raise self._error(f"{spec.name!r} is of block {spec.block}, of layers {supertask.layers}", where)
        return supertask.layers[spec.block]

    def _kv_cache(self, supertask: Supertask, spec: TensorSpec, where: str) -> Any:
        layer = self._layer(supertask, spec, where)
        if (layer, spec.name) not in self._kv_caches:
            raise self._error(f"layer {layer} has no KV storage {spec.name!r}", where)
        cache = self._kv_caches[layer, spec.name]
        dtype, shape = self._device.layout(cache)
        if dtype != spec.dtype or list(shape[1:]) != spec.shape[1:]:
            raise self._error(f"{spec.name!r} is {spec.dtype} {spec.shape}, not {dtype} {list(shape)}", where)
        return cache

    def _error(self, what: str, where: str) -> UserError:
        return UserError(f"artifact {self._opened.directory} is inconsistent: {what}", where=where)


@dataclass
class _BoundChain:
    """Supertasks with all but what other ranks, or the runtime, give in place."""

    chain: Chain
    reads: list[str]
    last_used: list[str]
    """Of what it reads: what nothing after it does, so that the memory can be used again."""


@dataclass
class _BoundCollective:
    """What joins tensors of several ranks, or sends them to the next stage."""

    op: str
    reads: list[str]
    outputs: list[str]
    last_used: list[str] = field(default_factory=list)


@dataclass
class _BoundPipeline:
    inputs: InputBuffers
    received: dict[str, Layout]
    tasks: list[_BoundChain | _BoundCollective]
    outputs: tuple[Layout, Layout | None]


_RESULTS = frozenset({LOGITS, LAST_HIDDEN_STATE})


def _between_collectives(tasks: Sequence[Link | _BoundCollective]) -> list[list[Link] | _BoundCollective]:
    groups: list[list[Link] | _BoundCollective] = []
    for task in tasks:
        if isinstance(task, _BoundCollective):
            groups.append(task)
        elif groups and isinstance(groups[-1], list):
            groups[-1].append(task)
        else:
            groups.append([task])
    return groups


ProgramKey = tuple[str, str | None]
"""The file of a program, and its name in there."""


def device_of(opened: OpenArtifact) -> Device[Any]:
    """The device that an artifact's programs run on."""
    return get_backend(opened.artifact.backend).device()


def load_programs(opened: OpenArtifact) -> dict[ProgramKey, LoadedProgram]:
    """Every program. Raises UserError."""
    backend = get_backend(opened.artifact.backend)
    keys = {(program.file, program.entry) for program in opened.artifact.programs.values()}
    parallel = opened.artifact.parallel_config
    elements = parallel.tensor_parallel_size * parallel.pipeline_parallel_size * parallel.data_parallel_size
    own = opened.artifact.library
    library = None if own is None else opened.path(own)
    ordered = sorted(keys, key=str)
    return {(file, entry): _load(backend, opened.path(file), elements, entry, library) for file, entry in ordered}


def _load(backend: Backend, path: Path, concurrency: int, entry: str | None, library: Path | None) -> LoadedProgram:
    try:
        if library is None:  # a backend without a library need not know of them
            return backend.load(path, concurrency, entry)
        return backend.load(path, concurrency, entry, library)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"backend {backend.name!r} cannot load program {path.name}: {error}",
            where=str(path),
            hint="build the artifact again with the torch that is installed",
        ) from error


def _dtype(name: str) -> str:
    if name not in ITEMSIZE:
        raise UserError(f"there is no dtype {name!r}", where="artifact.json")
    return name
