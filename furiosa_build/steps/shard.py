"""partition:weights: the parameters of every rank of every stage, as the files the runtime maps.

Where there is one rank and one stage, the files that `quantize` wrote are the parameter files, by hard link. Those of
someone else's checkpoint are copied: they may change, and their scales may have another dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from furiosa_build.backends.registry import get_backend
from furiosa_build.core.files import link_or_copy
from furiosa_build.core.progress import expect
from furiosa_build.ir.sharding import Share
from furiosa_build.quant.scheme import QuantScheme, scheme
from furiosa_build.steps.base import BuildState, Entry, Inputs, Likeness, Step, Work
from furiosa_build.steps.weights import (
    CHECKPOINT,
    LARGEST_FILE,
    SOURCE,
    WeightsRequest,
    conversion_of,
    open_weights,
    parameters_of,
    size_of,
    weight_files,
    weights_request,
)

if TYPE_CHECKING:
    from torch import Tensor

    from furiosa_build.backends.base import Packer
    from furiosa_build.ir.tensors import Layout
    from furiosa_build.plan.budget.costs import Costs
    from furiosa_build.plan.budget.durations import KnownStep
    from furiosa_build.plan.model import ModelPlan
    from furiosa_build.plan.planner import PlannedStep, Site
    from furiosa_build.weights.source import TensorSource


class ShardRequest(WeightsRequest):
    """Parameters to be laid out.

    Attributes:
        packed_for: The backend, and the instruction set, that parameters are packed for. None: they are stored as they
            are.
    """

    packed_for: tuple[str, str] | None = None


class Shard(Step[ShardRequest]):
    """Writes or links `stage-S-rank-R-*.safetensors`. The inputs are the checkpoint."""

    name = "shard"
    label = "partition:weights"
    Request = ShardRequest
    packages = ("torch", "numpy")
    uses_schemes = True

    def plan(self, site: Site) -> Entry:
        model, checkpoint = site.model, {site.maker("checkpoint"): CHECKPOINT}
        parameters = parameters_of(model)
        return Entry(
            self.label,
            f"lay out {len(parameters)} parameters for {_elements(model)}",
            needs=checkpoint if model.writes_checkpoint else {site.name_of("fetch"): SOURCE, **checkpoint},
            reads={
                "parameters": parameters,
                **({"schemes": dict(model.schemes)} if model.taken else {}),
                **({} if model.writes_checkpoint else conversion_of(model)),
                **(_divided(model) if model.spec.parallel.is_divided else {}),
                **(_packing(model) if model.packs else {}),
            },
        )

    def runs_backend(self, reads: Mapping[str, Any]) -> bool:
        return "packing" in reads

    def request(self, step: PlannedStep, state: BuildState) -> ShardRequest:
        model, weights = step.model, weights_request(step, state)
        packed_for = (model.spec.backend.name, model.isa) if model.packs else None
        return ShardRequest(**dict(weights), packed_for=packed_for)

    def work(self, step: PlannedStep, costs: Costs) -> Work:
        sizes = costs.of(step)
        if not step.model.writes_checkpoint:
            return Work(sizes.weights, sizes.files)
        is_copied = step.model.spec.parallel.is_divided or step.model.packs
        return Work(sizes.files, sizes.files) if is_copied else Work()

    def held(self, step: PlannedStep, costs: Costs) -> int:
        return 0 if step.model.writes_checkpoint else costs.of(step).largest_weight

    def likeness(self, step: KnownStep) -> Likeness:
        if "fetch" not in step.needs and "packing" not in step.reads:  # it links what quantize has written
            return Likeness((False,))
        return Likeness((True, step.is_drawn), size_of(step.reads["parameters"]))

    def run(self, request: ShardRequest, inputs: Inputs, output: Path) -> dict[str, str]:
        is_divided = request.ranks > 1 or len(request.stages) > 1
        if not request.schemes or request.taken or is_divided or request.packed_for is not None:
            return _write(request, inputs, output)
        checkpoint = weight_files(inputs.files)
        names = dict(zip(checkpoint, _file_names(len(checkpoint)), strict=True))
        for name, path in checkpoint.items():
            link_or_copy(path, output / names[name])
        return {names[name]: request.inputs[name] for name in checkpoint}


def _elements(model: ModelPlan) -> str:
    return f"{len(model.stages)} stages of {model.ranks} ranks" if model.spec.parallel.is_divided else "stage 0, rank 0"


def _divided(model: ModelPlan) -> dict[str, Any]:
    """How the model is divided, which parameters the first and the last stage need, and what belongs to a layer."""
    parallel, outline = model.spec.parallel, model.outline
    return {
        "parallel": [model.ranks, parallel.pipeline_parallel_size, *(parallel.num_blocks_per_pp_stage or ())],
        "roles": {
            "layer_prefix": outline.layer_prefix,
            "first": outline.first_parameters,
            "last": outline.last_parameters,
        },
    }


def _packing(model: ModelPlan) -> dict[str, Any]:
    """The backend whose layout parameters are stored in, and what shapes that."""
    backend = get_backend(model.spec.backend.name)
    return {"packing": {"backend": backend.name, "isa": model.isa, "tools": dict(backend.key_factors())}}


def _write(request: ShardRequest, inputs: Inputs, output: Path) -> dict[str, str]:
    from furiosa_build.weights.safetensors_writer import SafetensorsWriter, split_into_files

    outline, ranks, stages, schemes = request.outline, request.ranks, request.stages, request.schemes
    source = open_weights(request, inputs.files)
    packer = None if request.packed_for is None else _packer(*request.packed_for)
    planned = []
    for stage in range(len(stages)):
        for rank in range(ranks):
            parameters = []
            for name in outline.stage_parameters(stages, stage):
                parameter = outline.parameters[name]
                share = Share(parameter.layout, parameter.cut if ranks > 1 else None, ranks, rank)
                parameters.append((name, scheme(schemes.get(name, "none")), share))
            stored = {
                own.stored_name(name, part): _Stored(own, part, share, packer)
                for name, own, share in parameters
                for part in own.parts(share.local)
            }
            of_parameters = (
                {stored_name: stored[stored_name].layout for stored_name in own.layouts(name, share.local)}
                for name, own, share in parameters
            )
            files = split_into_files(of_parameters, LARGEST_FILE)
            planned += [
                (name, layouts, stored)
                for name, layouts in zip(_file_names(len(files), stage, rank), files, strict=True)
            ]
    expect(sum(layout.nbytes for _, layouts, _ in planned for layout in layouts.values()))
    digests = {}
    for name, layouts, stored in planned:
        with SafetensorsWriter(output / name, layouts) as writer:
            for tensor in writer.order:
                writer.write(tensor, stored[tensor].read(tensor, source))
        digests[name] = writer.sha256
    return digests


class _Stored(NamedTuple):
    """A tensor of a rank's files: a part of a parameter."""

    scheme: QuantScheme
    part: str
    share: Share
    packer: Packer | None

    @property
    def layout(self) -> Layout:
        """The tensor's layout in the file."""
        layout = self.scheme.parts(self.share.local)[self.part]
        return layout if self.packer is None else self.packer.layout(self.scheme.text, self.part, layout)

    def read(self, name: str, source: TensorSource) -> Tensor:
        """The rank's share of the tensor that `source` has under this name, packed if it is to be."""
        tensor = self._share(name, source)
        return tensor if self.packer is None else self.packer.pack(self.scheme.text, self.part, tensor)

    def _share(self, name: str, source: TensorSource) -> Tensor:
        import torch

        from furiosa_build.weights.cast import cast

        derived = self.scheme.derived(self.part, self.share.local)
        if derived is not None:
            return derived
        dtype = self.scheme.parts(self.share.local)[self.part].dtype
        return cast(name, self.scheme.shard(self.part, source.read(name), self.share), getattr(torch, dtype))


def _packer(backend: str, isa: str) -> Packer:
    packer = get_backend(backend).packer(isa)
    if packer is None:
        raise ValueError(f"backend {backend!r} packs nothing for {isa!r}")
    return packer


def _file_names(count: int, stage: int = 0, rank: int = 0) -> list[str]:
    return [f"stage-{stage}-rank-{rank}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
