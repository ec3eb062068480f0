"""The files of a model's source as two lists. They stay where they are: a directory or the hub's cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from furiosa_build.core.errors import UserError
from furiosa_build.ir.outline import ParameterOutline
from furiosa_build.recipe.schema import ModelSpec
from furiosa_build.weights.hf_layout import (
    INDEX_FILE,
    MODEL_FILES,
    check_file,
    check_weight_file,
    read_json,
    source_files,
)
from furiosa_build.weights.listing import PARAM_FILE, ModelFiles, Source, SourceFile
from furiosa_build.weights.locate import is_hub_model, local_directory, locate, param_file


def describe(
    model: ModelSpec,
    roots: Sequence[Path],
    parameters: Mapping[str, ParameterOutline],
    hash_file: Callable[[Path], str],
    checkpoint: Path | None = None,
) -> tuple[Source, ModelFiles]:
    """The weights, and the files that travel beside them.

    Args:
        model: Which model.
        roots: Where a relative path is looked up.
        parameters: What is drawn when weights are random.
        hash_file: sha256 of a file; may remember.
        checkpoint: The directory that has the weights, if the model's own are not taken.
    """
    seed = model.seed_for_random_weight
    own = checkpoint is None and model.param_file_path is None
    directory = local_directory(model, roots) if seed is not None else locate(model, roots, None, weights=own)
    described = {} if directory is None else _describe(directory, MODEL_FILES, hash_file)
    config = described.pop("config.json", None)
    if directory is not None and config is not None:
        _check_config(model, directory / "config.json")
    if seed is not None:
        weights = Source(seed=seed, parameters=dict(parameters))
    elif (file := param_file(model, roots)) is not None:
        check_weight_file(file)
        weights = Source(files={PARAM_FILE: SourceFile(size=file.stat().st_size, sha256=hash_file(file))})
    else:
        assert directory is not None
        weights = Source(files=_describe(checkpoint or directory, source_files(checkpoint or directory), hash_file))
    revision = directory.name if directory is not None and is_hub_model(model, roots) else None
    return weights, ModelFiles(files=described, revision=revision)


def _check_config(model: ModelSpec, path: Path) -> None:
    """A recipe's architecture must be that of the weights."""
    found = read_json(path)
    for key in ("model_type", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        expected = (model.architecture or {}).get(key)
        if expected is not None and key in found and found[key] != expected:
            raise UserError(
                f"config.json says {key}={found[key]!r}, the recipe's architecture says {expected!r}",
                where=f"{path}, model.architecture.{key}",
                hint="name the weights that the recipe describes, or set model.architecture=null",
            )


def _describe(directory: Path, names: Sequence[str], hash_file: Callable[[Path], str]) -> dict[str, SourceFile]:
    files = [directory / name for name in names if (directory / name).is_file()]
    for file in files:
        if file.name in (*MODEL_FILES, INDEX_FILE):
            check_file(file)
        else:
            check_weight_file(file)
    return {file.name: SourceFile(size=file.stat().st_size, sha256=hash_file(file)) for file in files}
