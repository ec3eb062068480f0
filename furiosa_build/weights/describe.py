"""The files of a model's sources as two lists. They stay where they are: a directory or the hub's cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from furiosa_build.ir.outline import ParameterOutline
from furiosa_build.recipe.schema import ModelSpec
from furiosa_build.weights.config import check_architecture_of_weights
from furiosa_build.weights.formats import check_weight_file
from furiosa_build.weights.hf_layout import INDEX_FILE
from furiosa_build.weights.listing import ListedFile, ListedWeights, ModelFiles
from furiosa_build.weights.model_source import ModelSource


def describe(
    model: ModelSpec,
    described_by: ModelSource | None,
    weights: ModelSource,
    parameters: Mapping[str, ParameterOutline],
    hash_file: Callable[[Path], str],
) -> tuple[ListedWeights, ModelFiles]:
    """The weights, and the files that travel beside them. Fetches those that are not on this machine.

    Args:
        model: Which model.
        described_by: The source that has the model's config and the tokenizer's files; None: none has any.
        weights: The source of the weights, which may be the same.
        parameters: What is drawn when weights are random.
        hash_file: sha256 of a file; may remember.
    """
    if weights.seed is None:
        files = weights.weight_files()
        for name, path in files.items():
            if name != INDEX_FILE:
                check_weight_file(path)
        found = ListedWeights(files=listed(files, hash_file))
    else:
        found = ListedWeights(seed=weights.seed, parameters=dict(parameters))
    if described_by is None:
        return found, ModelFiles()
    files = described_by.model_files()
    config = files.pop("config.json", None)
    if config is not None:
        check_architecture_of_weights(model, config)
    return found, ModelFiles(files=listed(files, hash_file), revision=described_by.commit())


def listed(files: Mapping[str, Path], hash_file: Callable[[Path], str]) -> dict[str, ListedFile]:
    """Files by name, with size and digest."""
    return {name: ListedFile(size=path.stat().st_size, sha256=hash_file(path)) for name, path in files.items()}
