"""Section `scheduler`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from furiosa_build.recipe.schema.section import PositiveInt, Section


class SchedulerConfig(Section):
    """Defaults of the runtime's scheduler, kept in the artifact.

    Attributes:
        npu_queue_limit: Steps in flight at a time, where ranks and stages are threads.
        max_processing_samples: Requests admitted at a time, waiting ones included.
        spare_blocks_ratio: Share of the KV blocks kept for sequences that already run.
        is_offline: Requests are ordered for throughput: all that matters is when the last is finished.
        prefill_chunk_size: Most tokens of a prompt that run at once; decode steps come between. None: as many as a
            bucket takes.
    """

    npu_queue_limit: PositiveInt = 2
    max_processing_samples: PositiveInt = 65536
    spare_blocks_ratio: Annotated[float, Field(ge=0, lt=1, strict=False)] = 0.2
    is_offline: bool = False
    prefill_chunk_size: PositiveInt | None = None
