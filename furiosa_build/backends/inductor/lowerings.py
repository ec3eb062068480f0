"""The operators that AOTInductor is given another formulation of."""

from __future__ import annotations

from furiosa_build.backends import ops
from furiosa_build.backends.inductor.paged_attention import lower_paged_attention, lower_write_kv_cache
from furiosa_build.backends.lowering import Lowerings

LOWERINGS: Lowerings = {
    ops.PAGED_ATTENTION: lower_paged_attention,
    ops.WRITE_KV_CACHE: lower_write_kv_cache,
}
