"""Random weights as a source: they are drawn where they are needed, see `weights.random`."""

from __future__ import annotations

from typing import Any

from furiosa_build.core.errors import UserError
from furiosa_build.weights.model_source import ModelSource, Reference


class RandomWeights(ModelSource):
    """Weights that are drawn from a seed: `model.seed_for_random_weight`."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @classmethod
    def sniff(cls, reference: Reference) -> RandomWeights | None:
        return None if reference.seed is None else cls(reference.seed)

    def config(self) -> dict[str, Any]:
        raise UserError("random weights have no config.json", where="model.seed_for_random_weight")
