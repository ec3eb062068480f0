"""Section `parallel`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from furiosa_build.recipe.schema.section import PositiveInt, Section, as_tuple


class ParallelSpec(Section):
    """Degrees of parallelism: ranks that share every layer, stages that follow each other, replicas of all that.

    `data_parallel_size` is by default what the devices have elements for; `num_blocks_per_pp_stage`, the layers of each
    stage, by default as many for each.
    """

    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    data_parallel_size: PositiveInt | None = None
    num_blocks_per_pp_stage: Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)] | None = None

    @property
    def is_divided(self) -> bool:
        """Whether the model is divided among elements, so that each has parameter files of its own."""
        return (self.tensor_parallel_size, self.pipeline_parallel_size) != (1, 1)
