"""Section `scheduler`: defaults of the runtime, kept in the artifact."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from furiosa_build.recipe.schema.section import PositiveInt, Section


class SchedulerConfig(Section):
    """Defaults of the runtime's scheduler, kept in the artifact.

    Attributes:
        npu_queue_limit: Largest number of steps in flight, where ranks and stages are threads.
        max_processing_samples: Largest number of requests admitted at a time, waiting ones included.
        spare_blocks_ratio: Fraction of the KV blocks that is reserved for running sequences.
        is_offline: Schedule for throughput: only the time when the last request finishes counts.
        prefill_chunk_size: Largest number of prompt tokens in one step; decode steps run in between. None: as many
            as a bucket takes.
    """

    npu_queue_limit: PositiveInt = 2
    max_processing_samples: PositiveInt = 65536
    spare_blocks_ratio: Annotated[float, Field(ge=0, lt=1, strict=False)] = 0.2
    is_offline: bool = False
    prefill_chunk_size: PositiveInt | None = None
