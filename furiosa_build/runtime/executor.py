"""Runs the pipelines of an artifact: programs loaded once, parameters mapped, KV caches allocated, inputs
bound.

What can be settled before the first step is: per supertask there is a flat list of inputs, in which only the
activations are still open. A step fills those in and calls the program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.artifact.schema import Pipeline, Supertask, TensorSpec
from furiosa_build.backends import Backend, LoadedProgram, get_backend
from furiosa_build.errors import UserError
from furiosa_build.runtime.kv_cache import Slots

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOGITS = "logits"


@dataclass(frozen=True)
class Row:
    """One sequence's part of a run.

    Attributes:
        tokens: The new tokens; their keys and values are written.
        start: Position of the first of them: how many tokens of the sequence are computed already.
        slots: KV slots of the sequence's tokens from position 0 on, the new ones included. int64 [>= start +
            new].
    """

    tokens: Sequence[int]
    start: int
    slots: Slots


class Executor:
    """The programs of an artifact with its parameters and KV caches.

    Args:
        opened: The artifact.
        num_slots: Slots of each layer's KV caches. They start as zeros: what is masked still takes part in
            products, and 0 * NaN is NaN.

    Raises:
        UserError: Parameters, programs and pipelines do not fit together, or the caches do not fit into
        memory.
    """

    def __init__(self, opened: OpenArtifact, num_slots: int) -> None:
        self._opened = opened
        artifact = opened.artifact
        self._parameters = _map_parameters(opened)
        self._kv_caches = _allocate_kv_caches(opened, num_slots)
        backend = get_backend(artifact.backend)
        files = {program.file for program in artifact.programs.values()}
        self._programs = {file: _load(backend, opened.path(file)) for file in sorted(files)}
        self._pipelines = {pipeline.name: self._bind(pipeline) for pipeline in artifact.pipelines}

    def run(self, pipeline: str, rows: Sequence[Row]) -> Tensor:
        """Runs one bucket.

        Args:
            pipeline: Its name.
            rows: At most batch_size; the bucket is filled up with padding that writes to the scratch block
                only.

        Returns:
            Logits in the program's dtype, [batch_size, query_length, vocab], or [batch_size, 1, vocab] where
            the pipeline returns those of each row's last token only.
        """
        bound = self._pipelines[pipeline]
        bound.inputs.fill(rows)
        tensors = dict(bound.inputs.tensors)
        with torch.inference_mode():
            for task in bound.tasks:
                arguments = task.arguments.copy()
                for index, name in task.activations:
                    arguments[index] = tensors[name]
                outputs = task.program.run(arguments)
                for name in task.last_used:
                    del tensors[name]
                tensors.update(zip(task.outputs, outputs, strict=True))
        return tensors[LOGITS]

    def _bind(self, pipeline: Pipeline) -> _BoundPipeline:
        fed = InputBuffers(pipeline)
        known = set(fed.tensors)
        tasks = []
        for number, supertask in enumerate(pipeline.supertasks):
            where = f"pipelines[{pipeline.name!r}].supertasks[{number}]"
            tasks.append(self._bind_supertask(supertask, known, where))
            known.update(supertask.outputs)
        if not tasks or tasks[-1].outputs != [LOGITS]:
            raise self._error("its last supertask does not give `logits` alone", f"pipelines[{pipeline.name!r}]")
        _release_early(tasks)
        return _BoundPipeline(fed, tasks)

    def _bind_supertask(self, supertask: Supertask, known: set[str], where: str) -> _BoundTask:
        if supertask.kind != "comp" or supertask.ranks != [0]:
            raise self._error("this runtime runs artifacts of one rank only", where)
        program = self._opened.artifact.programs[supertask.program]
        if len(program.outputs) != len(supertask.outputs):
            raise self._error(f"program {supertask.program!r} has {len(program.outputs)} outputs", where)
        arguments: list[Tensor] = []
        activations = []
        for index, spec in enumerate(program.inputs):
            if spec.role == "activation":
                name = supertask.inputs.get(spec.name, "")
                if name not in known:
                    raise self._error(f"nothing gives tensor {name!r} for input {spec.name!r}", where)
                activations.append((index, name))
                arguments.append(_PLACEHOLDER)
            elif spec.role == "parameter":
                arguments.append(self._parameter(supertask, spec, where))
            else:
                arguments.append(self._kv_cache(supertask, spec, where))
        return _BoundTask(self._programs[program.file], arguments, activations, supertask.outputs)

    def _parameter(self, supertask: Supertask, spec: TensorSpec, where: str) -> Tensor:
        name = supertask.parameter_prefix + spec.name
        tensor = self._parameters.get((supertask.stage, 0), {}).get(name)
        if tensor is None:
            raise self._error(f"no parameter file of stage {supertask.stage} has {name!r}", where)
        stored = f"{tensor.dtype} {list(tensor.shape)}"
        dtype = _dtype(spec.dtype)
        if tensor.dtype != dtype:
            try:
                tensor = tensor.view(dtype)
            except RuntimeError as error:
                raise self._error(f"parameter {name!r}, stored as {stored}, is no {spec.dtype}", where) from error
        if list(tensor.shape) != spec.shape:
            raise self._error(f"parameter {name!r}, stored as {stored}, is no {spec.dtype} {spec.shape}", where)
        return tensor

    def _kv_cache(self, supertask: Supertask, spec: TensorSpec, where: str) -> Tensor:
        if supertask.layer is None or (supertask.layer, spec.name) not in self._kv_caches:
            raise self._error(f"layer {supertask.layer} has no KV storage {spec.name!r}", where)
        cache = self._kv_caches[supertask.layer, spec.name]
        if cache.dtype != _dtype(spec.dtype) or list(cache.shape[1:]) != spec.shape[1:]:
            raise self._error(
                f"{spec.name!r} is {spec.dtype} {spec.shape}, not {cache.dtype} {list(cache.shape)}", where
            )
        return cache

    def _error(self, what: str, where: str) -> UserError:
        return UserError(f"artifact {self._opened.directory} is inconsistent: {what}", where=where)


@dataclass
class _BoundTask:
    """A supertask with all but its activations in place."""

    program: LoadedProgram
    arguments: list[Tensor]
    activations: list[tuple[int, str]]
    outputs: list[str]
    last_used: list[str] = field(default_factory=list)
    """Tensors that nothing after this supertask reads, so that their memory can be used again."""


@dataclass
class _BoundPipeline:
    inputs: InputBuffers
    tasks: list[_BoundTask]


class InputBuffers:
    """The tensors that the runtime feeds into a pipeline, allocated once and overwritten at every step.

    `tensors` has those of the following that the pipeline reads (B, T, L: batch, query and context length;
    int64): input_ids, position_ids, slot_mapping [B, T]; context_slots [B, L]; context_lens, logits_indices
    [B].
    """

    def __init__(self, pipeline: Pipeline) -> None:
        batch, query, context = pipeline.batch_size, pipeline.query_length, pipeline.context_length
        shapes: Mapping[str, tuple[int, ...]] = {
            "input_ids": (batch, query),
            "position_ids": (batch, query),
            "slot_mapping": (batch, query),
            "context_slots": (batch, context),
            "context_lens": (batch,),
            "logits_indices": (batch,),
        }
        read = {name for supertask in pipeline.supertasks for name in supertask.inputs.values()}
        self._arrays: dict[str, NDArray[np.int64]] = {
            name: np.zeros(shape, dtype=np.int64) for name, shape in shapes.items()
        }
        self._positions = np.arange(context, dtype=np.int64)
        self.tensors = {name: torch.from_numpy(array) for name, array in self._arrays.items() if name in read}

    def fill(self, rows: Sequence[Row]) -> None:
        """Lays `rows` out; what is left over is padding: token 0 at position 0, written to slot 0."""
        arrays = self._arrays
        for array in arrays.values():
            array.fill(0)
        arrays["context_lens"].fill(1)
        for index, row in enumerate(rows):
            new = len(row.tokens)
            end = row.start + new
            arrays["input_ids"][index, :new] = row.tokens
            arrays["position_ids"][index, :new] = self._positions[row.start : end]
            arrays["slot_mapping"][index, :new] = row.slots[row.start : end]
            arrays["context_slots"][index, :end] = row.slots[:end]
            arrays["context_lens"][index] = end
            arrays["logits_indices"][index] = new - 1


_PLACEHOLDER = torch.empty(0)


def _release_early(tasks: Sequence[_BoundTask]) -> None:
    seen = {LOGITS}
    for task in reversed(tasks):
        names = {name for _, name in task.activations} | set(task.outputs)
        task.last_used = sorted({name for _, name in task.activations} - seen)
        seen |= names


def _load(backend: Backend, path: Path) -> LoadedProgram:
    try:
        return backend.load(path)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"backend {backend.name!r} cannot load program {path.name}: {error}",
            where=str(path),
            hint="build the artifact again with the torch that is installed",
        ) from error


def _map_parameters(opened: OpenArtifact) -> dict[tuple[int, int], dict[str, Tensor]]:
    """(stage, rank) -> name -> tensor. The tensors lie in private mappings of the files: nothing is read."""
    parameters: dict[tuple[int, int], dict[str, Tensor]] = {}
    for group in opened.artifact.parameters:
        tensors = parameters.setdefault((group.stage, group.rank), {})
        for file in group.files:
            with safe_open(opened.path(file), framework="pt") as mapped:
                names = mapped.keys()
                tensors.update((name, mapped.get_tensor(name)) for name in names)
    return parameters


def _allocate_kv_caches(opened: OpenArtifact, num_slots: int) -> dict[tuple[int, str], Tensor]:
    caches = {}
    try:
        for spec in opened.artifact.kv_cache:
            for name in ("key_cache", "value_cache"):
                shape = (num_slots, *spec.shape_per_slot)
                caches[spec.layer, name] = torch.zeros(shape, dtype=_dtype(spec.dtype))
    except RuntimeError as error:
        raise UserError(
            f"no memory for KV caches of {num_slots} tokens",
            where="paged_attention_num_blocks",
            hint="lower paged_attention_num_blocks",
        ) from error
    return caches


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"torch has no dtype {name!r}", where="artifact.json")
    return dtype
