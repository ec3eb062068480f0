"""The fields of a model's config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.core.errors import UserError
from furiosa_build.weights.hf_layout import read_json
from furiosa_build.weights.model_source import ModelSource

if TYPE_CHECKING:
    from furiosa_build.recipe.schema import ModelSpec

_QUANTIZATION = ("quantization_config", "compression_config")
"""Where a config.json tells that weights are quantized. Empty, it tells nothing."""
_MUST_AGREE = ("model_type", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def config_of(model: ModelSpec, source: ModelSource | None, own_weights: bool) -> dict[str, Any]:
    """The recipe's `architecture`, or what the source says.

    Unless the source's own weights are used, these may be quantized.
    """
    if model.architecture is None:
        assert source is not None
        config = source.config()
    else:
        config = dict(model.architecture)
    quantized = [key for key in _QUANTIZATION if config.pop(key, None)]
    if quantized and own_weights:
        raise UserError(
            f"the weights of {model.model_id_or_path} are quantized already",
            where=f"config.json, {quantized[0]}",
            valid="weights in float32, bfloat16 or float16",
            hint="name the original model; recipes quantize it themselves (quantization=fp8), or take weights that are "
            "quantized already: quantization.quantize_artifact_path=DIRECTORY",
        )
    return config


def respelled(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Fields of a config.json whose meaning is plain but that transformers itself stumbles over, as it reads them."""
    named = [key for key in ("dtype", "torch_dtype") if str(config.get(key)).startswith(("auto", "torch."))]
    fields: dict[str, Any] = {**dict.fromkeys(named), "dtype": dtype} if named else {}
    empty = [key for key in _QUANTIZATION if config.get(key) == {}]
    return {**fields, **dict.fromkeys(empty)}


def check_architecture_of_weights(model: ModelSpec, path: Path) -> None:
    """Raises UserError unless a recipe's architecture is that of the config.json beside the weights."""
    found = read_json(path)
    for key in _MUST_AGREE:
        expected = (model.architecture or {}).get(key)
        if expected is not None and key in found and found[key] != expected:
            raise UserError(
                f"config.json says {key}={found[key]!r}, the recipe's architecture says {expected!r}",
                where=f"{path}, model.architecture.{key}",
                hint="name the weights that the recipe describes, or set model.architecture=null",
            )
