"""A config.json as transformers reads it: its own classes say what it means, and what is wrong with it."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _get_model_class
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from furiosa_build.core.errors import UserError
from furiosa_build.core.python_floats import without_floats

WHERE = "config.json"
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
"""Fields that a build reads. A config.json may leave them to the defaults of its class, or call them otherwise."""
_OTHER_NAMES = {"max_position_embeddings": "max_seq_len"}
"""What classes call such a field that do not know it (MPT)."""
_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of a multimodal model that go before those of its text part, where transformers loads the whole."""


def resolve_config(fields: Mapping[str, Any], layers: int | None, stored_dtype: str | None) -> dict[str, Any]:
    """The fields of the config of the causal language model that transformers makes of a config.json.

    Args:
        fields: Of config.json.
        layers: Take only so many decoder layers; None: all.
        stored_dtype: The dtype of the weights, which counts where the config names none.

    Raises:
        UserError: transformers refuses it, with its reason.
    """
    config = read_config(fields)
    text = text_config(config)
    resolved, of_dtype = dict(fields), text
    if text is not config:
        resolved = {**without_floats(text.to_diff_dict()), "architectures": [_causal_class(text).__name__]}
    if _loads_more_than_text(config):
        resolved |= {name: fields[name] for name in _OF_THE_WHOLE if fields.get(name) is not None}
        resolved["tie_word_embeddings"], of_dtype = getattr(config, "tie_word_embeddings", False), config
    resolved["model_type"] = text.model_type
    if not resolved.get("architectures"):
        resolved["architectures"] = [_causal_class(text).__name__]
    for name in _SIZES:
        value = getattr(text, name, getattr(text, _OTHER_NAMES.get(name, name), None))
        if name not in resolved and type(value) is int:
            resolved[name] = value
    for name in ("torch_dtype", "transformers_weights"):
        resolved.pop(name, None)
    dtype = str(of_dtype.dtype).removeprefix("torch.") if of_dtype.dtype is not None else stored_dtype
    if dtype is None:
        resolved.pop("dtype", None)
    else:
        resolved["dtype"] = dtype
    return _cut(resolved, text, layers)


def read_config(fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A config.json as an instance of transformers' class."""
    model_type = fields.get("model_type")
    if model_type not in CONFIG_MAPPING:
        remote = " Code of its own (auto_map) is never run." if "auto_map" in fields else ""
        raise UserError(
            f"unsupported architecture: model_type {model_type!r} is not one that transformers knows.{remote}",
            where=f"{WHERE}, model_type",
            valid="a causal language model of the installed transformers",
        )
    plain = {key: value for key, value in fields.items() if key not in ("quantization_config", "auto_map")}
    for key in ("dtype", "torch_dtype"):
        name = plain.pop(key, None)
        if isinstance(name, str) and name != "auto":
            plain[key] = name.removeprefix("torch.")
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(plain))
        with _reasons(f"transformers refuses {WHERE}"):
            config: PreTrainedConfig = AutoConfig.from_pretrained(directory)
            return config


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the causal language model: of a multimodal model that of its text part.

    Raises UserError where transformers has no causal language model for it.
    """
    text = config.get_text_config()
    for each in (config, text):
        if type(each) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            whose = "it" if each is config else f"its text part, of type {text.model_type!r}"
            raise UserError(
                f"model_type {config.model_type!r} is not supported: transformers has no causal language model for "
                f"{whose}",
                where=f"{WHERE}, model_type",
                valid="a model type for which transformers' AutoModelForCausalLM has a class",
            )
    return text


def whole_of(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of the model that transformers makes of a config.json, where that is more than its text part."""
    return dict(fields) if _loads_more_than_text(read_config(fields)) else None


def causal_model(hf_config: Mapping[str, Any]) -> PreTrainedModel:
    """transformers' own model on the meta device. Raises UserError with the reason why it cannot be made."""
    config = read_config(hf_config)
    name = _causal_class(config).__name__
    with _reasons(f"transformers cannot make {name} of this {WHERE}", _hint(config)), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=config.dtype or torch.float32, attn_implementation="eager"
        )
    return model


def _causal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return cast("type[PreTrainedModel]", _get_model_class(config, MODEL_FOR_CAUSAL_LM_MAPPING))


def _loads_more_than_text(config: PreTrainedConfig) -> bool:
    """Whether `AutoModelForCausalLM` takes a config as it is, and not only its text part."""
    return config.get_text_config() is not config and _causal_class(config).config_class is not config.sub_configs.get(
        "text_config"
    )


def _cut(fields: dict[str, Any], config: PreTrainedConfig, layers: int | None) -> dict[str, Any]:
    """The config of the first layers. A list is cut where its class says that it has an entry for each layer."""
    if layers is None or layers >= config.num_hidden_layers:
        return fields
    own_name = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    cut = dict(fields)
    for key, value in fields.items():
        if (
            isinstance(value, list)
            and len(value) == config.num_hidden_layers
            and _is_per_layer(key, fields, own_name, layers)
        ):
            cut[key] = value[:layers]
    return {**cut, "num_hidden_layers": layers, own_name: layers}


def _is_per_layer(key: str, fields: Mapping[str, Any], own_name: str, layers: int) -> bool:
    """Whether a field of a config has an entry for each layer: left out, the class makes one as long as the model."""
    if key in ("layer_types", "mlp_layer_types"):  # those that every class checks
        return True
    lengths = set()
    for count in (layers, layers + 1):
        other = {name: value for name, value in fields.items() if name not in (key, "layer_types", "mlp_layer_types")}
        try:
            made = getattr(read_config({**other, "num_hidden_layers": count, own_name: count}), key, None)
        except UserError:  # the class has no default for it, and does not say
            return False
        lengths.add(len(made) - count if isinstance(made, list | tuple) else None)
    return lengths == {0}


def _hint(config: PreTrainedConfig) -> str:
    """What in a config may be the reason, where transformers' own words do not name it."""
    size = getattr(config, "vocab_size", None)
    ids = {name: value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    outside = [f"{name}={value}" for name, value in ids.items() if isinstance(value, int) and value >= (size or value)]
    return f"{', '.join(outside)} is not within the vocabulary of {size} tokens" if outside and size else ""


@contextmanager
def _reasons(what: str, hint: str = "") -> Iterator[None]:
    """Whatever transformers raises becomes a UserError with its reason whole, and with what it warned of before."""
    remarks: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            remarks.append(record.getMessage().partition("\n")[0].removesuffix(" {"))  # a whole config may follow

    collector, logger = Collector(logging.WARNING), logging.getLogger("transformers")
    logger.addHandler(collector)
    try:
        yield
    except Exception as error:
        told = ". ".join(dict.fromkeys(filter(None, [hint, *remarks])))
        raise UserError(f"{what}: {_reason(error)}", where=WHERE, hint=told) from error
    finally:
        logger.removeHandler(collector)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, KeyError | AttributeError | TypeError | AssertionError | IndexError | ZeroDivisionError):
        return f"{type(error).__name__}: {text}"
    return text
