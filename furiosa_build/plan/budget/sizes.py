"""Bytes of parameters and KV caches, from shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from furiosa_build.ir.kv_cache import KvCacheDtype
from furiosa_build.ir.outline import Outline, ParameterOutline
from furiosa_build.quant.scheme import scheme as find_scheme

if TYPE_CHECKING:
    from furiosa_build.plan.model import ModelPlan

SCRATCH_BLOCKS = 1
"""KV blocks that the runtime has for padding, beside those that sequences use."""


def nbytes(parameter: ParameterOutline) -> int:
    """Bytes of a parameter as the model has it, before quantization."""
    return parameter.layout.nbytes


def stored_bytes(parameter: ParameterOutline, scheme: str = "none") -> int:
    """Bytes of all tensors that a parameter becomes in the artifact."""
    return find_scheme(scheme).nbytes(parameter.layout)


def parameter_bytes(model: ModelPlan) -> int:
    """Bytes of a model's parameters in the artifact. Its files also have headers, some hundred bytes a parameter."""
    parameters = model.outline.parameters.items()
    return sum(stored_bytes(parameter, model.schemes.get(name, "none")) for name, parameter in parameters)


def rank_parameter_bytes(
    outline: Outline, stages: Sequence[Sequence[int]], stage: int, ranks: int, schemes: Mapping[str, str]
) -> int:
    """Bytes of the parameters of one rank of a stage; every rank has as much. `stages` has the layers of each."""
    found = 0
    for name in outline.stage_parameters(stages, stage):
        parameter = outline.parameters[name]
        if parameter.cut is not None and ranks > 1:
            parameter = parameter.model_copy(update={"shape": parameter.cut.local_shape(parameter.shape, ranks)})
        found += stored_bytes(parameter, schemes.get(name, "none"))
    return found


def kv_slot_bytes(outline: Outline, layers: Collection[int], ranks: int, kv_cache_dtype: KvCacheDtype = "auto") -> int:
    """Bytes of the keys and values of one token in these layers, of one rank among `ranks`."""
    found = 0
    for kind in outline.blocks:
        slots = kind.rank_slots(ranks, outline.dtype, kv_cache_dtype)
        found += len(set(kind.layers) & set(layers)) * sum(slot.nbytes for slot in slots)
    return found


def kv_cache_bytes_of(model: ModelPlan, blocks: int, layers: Collection[int]) -> int:
    """Bytes of the KV cache of these layers, of one rank: `blocks`, and the block for padding."""
    slots = (blocks + SCRATCH_BLOCKS) * model.spec.buckets.paged_attention_block_size
    return slots * kv_slot_bytes(model.outline, layers, model.ranks, model.spec.buckets.kv_cache_dtype)
