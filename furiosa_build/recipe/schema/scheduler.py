"""Section `scheduler`: defaults of the runtime, kept in the artifact."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from furiosa_build.ir.engine_options import (
    IsOffline,
    MaxProcessingSamples,
    NpuQueueLimit,
    PrefillChunkSize,
    SpareBlocksRatio,
)
from furiosa_build.recipe.schema.section import Section


class SchedulerConfig(Section):
    """Defaults of the runtime's scheduler, kept in the artifact. `ir.engine_options` says what each means.

    Without a `prefill_chunk_size` as many tokens run at once as a bucket takes.
    """

    npu_queue_limit: NpuQueueLimit = 2
    max_processing_samples: MaxProcessingSamples = 65536
    spare_blocks_ratio: Annotated[SpareBlocksRatio, Field(strict=False)] = 0.2
    is_offline: IsOffline = False
    prefill_chunk_size: PrefillChunkSize | None = None
