"""Where the files of a model are on this machine, and its config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.schema import ModelSpec, QuantizationSpec
from furiosa_build.weights.hf_layout import MODEL_FILES, WEIGHT_PATTERNS, read_json
from furiosa_build.weights.hub import HUB_ID, download


def is_hub_model(model: ModelSpec, roots: Sequence[Path]) -> bool:
    """Whether `model_id_or_path` is a hub id: no directory of that name is there, and it reads like one."""
    return local_directory(model, roots) is None and HUB_ID.fullmatch(model.model_id_or_path) is not None


def local_directory(model: ModelSpec, roots: Sequence[Path]) -> Path | None:
    """The directory that `model_id_or_path` names; a relative path is looked up in each of `roots`."""
    return next((path for path in _candidates(model.model_id_or_path, roots) if path.is_dir()), None)


def param_file(model: ModelSpec, roots: Sequence[Path]) -> Path | None:
    """The file that `param_file_path` names, if it is given; looked up like a directory. Raises UserError."""
    if model.param_file_path is None:
        return None
    for path in _candidates(model.param_file_path, roots):
        if path.is_file():
            return path
    raise UserError(
        f"parameter file {model.param_file_path!r} does not exist, or is no file",
        where="model.param_file_path",
        valid="a safetensors file that holds all parameters of the model, by their names in its state dict",
    )


def _candidates(path: str, roots: Sequence[Path]) -> list[Path]:
    expanded = Path(path).expanduser()
    return [expanded] if expanded.is_absolute() else [root / expanded for root in roots]


def checkpoint_directory(spec: QuantizationSpec, roots: Sequence[Path]) -> Path | None:
    """The directory that `quantize_artifact_path` names, if that is given. Raises UserError when there is none."""
    path = spec.quantize_artifact_path
    if path is None:
        return None
    for candidate in _candidates(path, roots):
        if candidate.is_dir():
            return candidate
    raise UserError(
        f"quantized checkpoint {path!r} does not exist",
        where="quantization.quantize_artifact_path",
        valid="a directory with a compressed-tensors checkpoint (also relative to the recipe's root)",
    )


def locate(model: ModelSpec, roots: Sequence[Path], revision: str | None, weights: bool = True) -> Path:
    """Where the files are on this machine: the directory, or the hub's cache for commit `revision`.

    Without `weights` they are not fetched. Raises UserError when there is neither.
    """
    directory = local_directory(model, roots)
    if directory is not None:
        return directory
    if not is_hub_model(model, roots):
        raise UserError(
            f"model directory {model.model_id_or_path!r} does not exist",
            where="model.model_id_or_path",
            valid="a directory in Hugging Face layout (also relative to the recipe's root), or a hub id: org/name",
        )
    return download(model, revision, (*WEIGHT_PATTERNS, *MODEL_FILES) if weights else MODEL_FILES)


def read_config(model: ModelSpec, roots: Sequence[Path], weights: bool = True) -> dict[str, Any]:
    """The fields of the model's config.json: the recipe's `architecture`, else from the directory or the hub.

    Without `weights`, because others are taken, these may be quantized.
    """
    config = read_json(locate_config(model, roots)) if model.architecture is None else dict(model.architecture)
    if not weights:
        config.pop("quantization_config", None)
    if "quantization_config" in config:
        raise UserError(
            f"the weights of {model.model_id_or_path} are quantized already",
            where="config.json, quantization_config",
            valid="weights in float32, bfloat16 or float16",
            hint="name the original model; recipes quantize it themselves (quantization=fp8), or take weights that are "
            "quantized already: quantization.quantize_artifact_path=DIRECTORY",
        )
    return config


def cut_config(config: Mapping[str, Any], model: ModelSpec) -> dict[str, Any]:
    """The config of the model's first `num_hidden_layers` layers, if that is given."""
    wanted, all_layers = model.num_hidden_layers, config["num_hidden_layers"]
    if wanted is None:
        return dict(config)
    cut = {
        key: value[:wanted] if isinstance(value, list) and len(value) == all_layers else value
        for key, value in config.items()
    }
    return {**cut, "num_hidden_layers": wanted}


def locate_config(model: ModelSpec, roots: Sequence[Path]) -> Path:
    """The model's config.json. Raises UserError when there is none."""
    directory = local_directory(model, roots)
    if directory is None and is_hub_model(model, roots):
        return download(model, model.revision, ("config.json",)) / "config.json"
    path = locate(model, roots, model.revision) / "config.json"
    if not path.is_file():
        raise UserError(
            "the model's directory has no config.json",
            where=str(path.parent),
            hint="is it in Hugging Face layout?",
        )
    return path
