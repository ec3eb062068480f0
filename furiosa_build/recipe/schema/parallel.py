"""Section `parallel`: ranks, stages and replicas."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from furiosa_build.recipe.schema.section import PositiveInt, Section, as_tuple


class ParallelSpec(Section):
    """Degrees of parallelism: ranks that share every layer, pipeline stages, and replicas of both.

    `data_parallel_size` is by default as large as the devices allow. `num_blocks_per_pp_stage` is the number of layers
    of each stage; by default they are divided evenly.
    """

    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    data_parallel_size: PositiveInt | None = None
    num_blocks_per_pp_stage: Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)] | None = None

    @property
    def is_divided(self) -> bool:
        """Whether the model is divided among several ranks or stages, each with parameter files of its own."""
        return (self.tensor_parallel_size, self.pipeline_parallel_size) != (1, 1)
