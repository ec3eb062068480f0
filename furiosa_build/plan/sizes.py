"""Bytes of parameters and KV caches, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Collection

from furiosa_build.plan.forms import Form
from furiosa_build.plan.outline import ParameterOutline
from furiosa_build.plan.planner import Plan

_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_INT8_SHAPE = 16
"""The shape that stands beside an int8 weight: two int64."""


def nbytes(parameter: ParameterOutline) -> int:
    """Of a parameter as the model has it."""
    return math.prod(parameter.shape) * _WIDTHS[parameter.dtype]


def stored_bytes(parameter: ParameterOutline, scheme: str = "none") -> int:
    """Of all tensors that a parameter becomes in the artifact."""
    if scheme == "none":
        return nbytes(parameter)
    form, (rows, columns) = Form.parse(scheme), parameter.shape
    scales = (1 if form.tensor else rows) * _WIDTHS[parameter.dtype]
    if not form.is_packed:
        return rows * columns + scales
    return rows * -(-columns // 4) * 4 + scales + _INT8_SHAPE


def parameter_bytes(plan: Plan) -> int:
    """Of all parameters in the artifact. Its files also have headers, some hundred bytes a parameter."""
    schemes = plan.schemes()
    return sum(
        stored_bytes(parameter, schemes.get(name, "none")) for name, parameter in plan.outline.parameters.items()
    )


def kv_block_bytes(plan: Plan) -> int:
    """Of one block of the KV cache in all layers, of all ranks together."""
    ranks = plan.spec.parallel.tensor_parallel_size
    return _kv_block_bytes(plan, [layer for stage in plan.stages for layer in stage], ranks) * ranks


def kv_cache_bytes_of(plan: Plan, layers: Collection[int], ranks: int) -> int:
    """Of the whole KV cache of these layers, of one rank among `ranks`."""
    return plan.spec.buckets.num_blocks * _kv_block_bytes(plan, layers, ranks)


def _kv_block_bytes(plan: Plan, layers: Collection[int], ranks: int) -> int:
    slot = 0
    for kind in plan.outline.blocks:
        heads, size = kind.cache_shape
        slot += len(set(kind.layers) & set(layers)) * 2 * max(heads // ranks, 1) * size
    return plan.spec.buckets.paged_attention_block_size * slot * _WIDTHS[plan.outline.dtype]


def kv_cache_bytes(plan: Plan) -> int:
    """Of the whole KV cache."""
    return plan.spec.buckets.num_blocks * kv_block_bytes(plan)
