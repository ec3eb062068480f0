"""The formulations of operators that are fastest on a CPU: what AOTInductor compiles, and the eager backend runs."""

from __future__ import annotations

from furiosa_build.backends import ops
from furiosa_build.backends.cpu_quantized_linear import lower_quantized_linear
from furiosa_build.backends.grouped_attention import lower_paged_attention
from furiosa_build.backends.lowering import Lowerings
from furiosa_build.quant.ops import QUANTIZED_LINEAR, quantized_linear_reference

LOWERINGS: Lowerings = {
    ops.PAGED_ATTENTION: lower_paged_attention,
    ops.WRITE_KV_CACHE: ops.write_kv_cache_reference,
    QUANTIZED_LINEAR: lower_quantized_linear,
}

CORE_ATEN_LOWERINGS: Lowerings = {**LOWERINGS, QUANTIZED_LINEAR: quantized_linear_reference}
"""The lowerings of a program that is made of operators of core ATen only."""
