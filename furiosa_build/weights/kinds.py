"""The kinds of source there are. A new one is a file of its own and an entry here."""

from __future__ import annotations

from furiosa_build.weights.directory import ModelDirectory
from furiosa_build.weights.hub import HubModel
from furiosa_build.weights.model_source import ModelSource, Reference
from furiosa_build.weights.seed import RandomWeights
from furiosa_build.weights.single_file import WeightFile

KINDS: list[type[ModelSource]] = [RandomWeights, ModelDirectory, WeightFile, HubModel]


def find_source(reference: Reference) -> ModelSource | None:
    """The source that a reference names, by the first kind that takes it for one of its own."""
    return next((found for kind in KINDS if (found := kind.sniff(reference)) is not None), None)
