"""Which part of the model lies on which processing element."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from furiosa_build.core.devices import elements, kind_of
from furiosa_build.core.errors import UserError
from furiosa_build.ir.outline import Outline
from furiosa_build.plan.budget.sizes import kv_cache_bytes_of, rank_parameter_bytes
from furiosa_build.plan.model import ModelPlan
from furiosa_build.plan.planner import Plan
from furiosa_build.recipe.schema import BuildSpec

EMULATED = "emulated on the host: speed is the host's"


@dataclass(frozen=True)
class Element:
    """A processing element and what it holds: bytes of parameters and KV cache, and the first and last layer.

    The bytes are those of the draft model as well, which has the first elements of each replica. `device` is the one
    that it belongs to; all elements of a CPU are emulated on this host, and of an NPU as well.
    """

    name: str
    device: str
    replica: int
    stage: int
    rank: int
    layers: tuple[int, int]
    parameters: int
    kv_cache: int


def placement(plan: Plan) -> list[Element]:
    """Every element that is used, replica by replica, stage by stage."""
    spec = plan.model.spec
    replicas, ranks, stages = spec.data_parallel_size, plan.model.ranks, len(plan.model.stages)
    sizes = [(0, 0)] * (ranks * stages)
    for model in plan.models.values():
        of_model = [_bytes(plan, model, stage) for stage in range(len(model.stages)) for _ in range(model.ranks)]
        for number, (parameters, kv_cache) in enumerate(of_model):
            sizes[number] = sizes[number][0] + parameters, sizes[number][1] + kv_cache
    found = []
    for number in range(replicas * stages * ranks):
        replica, place = divmod(number, stages * ranks)
        stage, rank = divmod(place, ranks)
        layers = plan.model.stages[stage]
        name, device = element_name(spec.devices, spec.target.num_elements, number)
        found.append(Element(name, device, replica, stage, rank, (layers[0], layers[-1]), *sizes[place]))
    return found


def element_name(devices: str, num_elements: int, number: int) -> tuple[str, str]:
    """The name of element `number` of `devices`, and the device that it belongs to. A CPU emulates any number."""
    named = elements(devices, num_elements)
    if kind_of(devices) == "npu":
        return named[number], named[number].rpartition(":")[0]
    return f"{named[0]} as element {number}", named[0]


def check_parallel(spec: BuildSpec, hf_config: Mapping[str, Any], outline: Outline) -> None:
    """Raises UserError when the model cannot be divided as the spec asks."""
    layers = outline.num_layers
    stages, ranks = spec.parallel.pipeline_parallel_size, spec.parallel.tensor_parallel_size
    if stages > layers:
        raise UserError(
            f"pipeline_parallel_size={stages} is more than the model's {layers} layers",
            where="parallel.pipeline_parallel_size",
            valid=f"1 to {layers}",
        )
    given = spec.parallel.num_blocks_per_pp_stage
    if given is not None and (len(given), sum(given)) != (stages, layers):
        raise UserError(
            f"num_blocks_per_pp_stage={list(given)}: {len(given)} stages of {sum(given)} layers in all",
            where="parallel.num_blocks_per_pp_stage",
            valid=f"{stages} numbers, {layers} in all",
        )
    if ranks == 1:
        return
    if all(parameter.cut is None for parameter in outline.parameters.values()):
        raise UserError(
            f"{outline.architecture} has no tensor-parallel plan that this version can follow",
            where=f"parallel.tensor_parallel_size={ranks}",
            valid="1",
        )
    fitting = [size for size in range(1, 129) if not _misfits(hf_config, outline, size)]
    if ranks not in fitting:
        raise UserError(
            f"tensor_parallel_size={ranks} does not divide {_misfits(hf_config, outline, ranks)[0]}",
            where="parallel.tensor_parallel_size",
            valid=", ".join(map(str, fitting)),
        )


def _misfits(hf_config: Mapping[str, Any], outline: Outline, ranks: int) -> list[str]:
    found = []
    if hf_config["num_attention_heads"] % ranks:
        found.append(f"the {hf_config['num_attention_heads']} attention heads")
    for name, parameter in outline.parameters.items():
        if parameter.cut is not None and not parameter.cut.fits(parameter.shape, ranks):
            size = parameter.shape[parameter.cut.dim]
            if parameter.cut.how == "heads":
                found.append(f"the {parameter.cut.heads} KV heads")
            elif size == hf_config.get("intermediate_size"):
                found.append(f"the intermediate size {size}")
            else:
                found.append(f"{name} of size {size}")
    return found


def _bytes(plan: Plan, model: ModelPlan, stage: int) -> tuple[int, int]:
    """Bytes of the parameters and of the KV cache of a rank; every rank of a stage has as much."""
    parameters = rank_parameter_bytes(model.outline, model.stages, stage, model.ranks, model.schemes)
    return parameters, kv_cache_bytes_of(model, plan.kv_blocks.count, model.stages[stage])
