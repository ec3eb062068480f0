"""What a compressed-tensors checkpoint is, by its config.json alone: which weights have which form.

https://github.com/vllm-project/compressed-tensors defines the format. What this version cannot compute is refused here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from furiosa_build.core.errors import UserError
from furiosa_build.ir.outline import Outline
from furiosa_build.quant.forms import Form

KEY = "quantization.quantize_artifact_path"

_FORMATS: Mapping[str, tuple[str, bool]] = {
    "float-quantized": ("float", False),
    "int-quantized": ("int", True),
    "pack-quantized": ("int", False),
}
"""Format -> the type of the weights' numbers, and whether they are stored as plain int8."""

_FREE = re.compile(
    r"_.*|architectures|dtype|torch_dtype|use_cache|.*_token_id|transformers_version|quantization_config|pad_.*"
)
"""Fields of a config.json that shape no number of the model, or are compared apart."""


class QuantizedCheckpoint(NamedTuple):
    """Which linear layers of a checkpoint are quantized, and how.

    Attributes:
        form: Of every quantized weight, as text.
        targets: What is quantized: `Linear` (all linear layers), a module's name, or `re:` and a pattern for the
            beginning of names.
        ignore: The same, for what is not.
    """

    form: str
    targets: tuple[str, ...]
    ignore: tuple[str, ...]

    def form_of(self, parameter: str) -> str:
        """The form of the weight of the linear layer called `parameter`, or `none`."""
        module = parameter.removesuffix(".weight")
        return self.form if _names(self.targets, module) and not _names(self.ignore, module) else "none"


def parse_checkpoint(
    path: Path, config: Mapping[str, Any], model: Mapping[str, Any], layers: int | None
) -> QuantizedCheckpoint:
    """The checkpoint that `config`, the fields of the config.json at `path`, describes.

    Args:
        path: For messages.
        config: Of the checkpoint.
        model: The fields of the config.json of the model that was quantized.
        layers: How many of its layers are taken; None: all.

    Raises:
        UserError: It is of another model, or quantized in a way that this version cannot compute.
    """
    described = config.get("quantization_config")
    if not isinstance(described, dict):
        raise UserError(
            "the checkpoint is not quantized: its config.json has no quantization_config",
            where=str(path),
            hint="weights that are not quantized are named by model.model_id_or_path",
        )
    _check_model(path, config, model, layers)
    return _Reader(path).read(described)


def check_quantizes(checkpoint: QuantizedCheckpoint, outline: Outline) -> None:
    """Raises UserError when the checkpoint quantizes nothing of the model."""
    if all(checkpoint.form_of(name) == "none" for name, p in outline.parameters.items() if p.linear):
        raise UserError(
            f"the quantized checkpoint quantizes no linear layer of {outline.architecture}",
            where=f"{KEY}: targets {list(checkpoint.targets)}, ignore {list(checkpoint.ignore)}",
            hint="name the model that was quantized (model.model_id_or_path)",
        )


def _check_model(path: Path, found: Mapping[str, Any], model: Mapping[str, Any], layers: int | None) -> None:
    """Whether two config.json are of the same model."""
    for key in sorted(found.keys() & model.keys(), key=lambda key: (key != "model_type", key)):
        same = found[key] == model[key]
        if key == "num_hidden_layers" and layers is not None:  # only these are taken
            same = isinstance(found[key], int) and found[key] >= layers
        if isinstance(found[key], list) and isinstance(model[key], list) and layers is not None:
            same = found[key][:layers] == model[key][:layers]  # such as the types of layers
        if not same and not _FREE.fullmatch(key):
            raise _of_another_model(path, key, found[key], model[key])
    theirs, ours = (config.get("dtype", config.get("torch_dtype")) for config in (found, model))
    if theirs is not None and ours is not None and theirs != ours:
        raise _of_another_model(path, "dtype", theirs, ours)


def _of_another_model(path: Path, key: str, found: Any, expected: Any) -> UserError:
    return UserError(
        f"the quantized checkpoint is of another model: its config.json says {key}={found!r}, the model's {expected!r}",
        where=f"{path}, {key}",
        hint=f"name the model that was quantized (model.model_id_or_path), or another checkpoint ({KEY})",
    )


class _Reader:
    """Reads the `quantization_config` of one file; `at` is a key's place in it, for messages."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self, config: Mapping[str, Any]) -> QuantizedCheckpoint:
        """Raises UserError for the first thing that cannot be taken."""
        self._only("quant_method", config.get("quant_method"), "compressed-tensors")
        self._only("quantization_status", config.get("quantization_status"), "compressed")
        self._only("kv_cache_scheme", config.get("kv_cache_scheme"), None)
        for key in ("transform_config", "sparsity_config"):
            if (given := config.get(key)) and given != {"format": "dense"}:
                raise self._refusal(key, given, "nothing")
        groups = config.get("config_groups")
        if not (isinstance(groups, dict) and groups):
            raise self._refusal("config_groups", groups, "a mapping with one group")
        forms: dict[str, str] = {}
        targets: list[str] = []
        for name, group in groups.items():
            at = f"config_groups.{name}"
            forms[at] = str(self._form(at, self._mapping(at, group), config.get("format")))
            targets += self._patterns(f"{at}.targets", group.get("targets"))
        first = next(iter(forms.values()))
        for at, form in forms.items():
            if form != first:
                what = f"{at} has {Form.parse(form).described}; the group before it {Form.parse(first).described}"
                raise UserError(what, where=self._where(at), valid="one scheme for all groups")
        ignore = self._patterns("ignore", config.get("ignore") or [])
        return QuantizedCheckpoint(first, tuple(targets), tuple(ignore))

    def _form(self, at: str, group: Mapping[str, Any], of_all: Any) -> Form:
        name, at_format = (of_all, "format") if group.get("format") is None else (group["format"], f"{at}.format")
        self._only(at_format, name, *_FORMATS)
        kind, plain = _FORMATS[name]
        weights, at_weights = self._mapping(f"{at}.weights", group.get("weights")), f"{at}.weights"
        self._only(f"{at_weights}.num_bits", weights.get("num_bits", 8), 8)
        self._only(f"{at_weights}.type", weights.get("type", "int"), kind)
        self._only(f"{at_weights}.strategy", weights.get("strategy"), "channel", "tensor")
        self._only(f"{at_weights}.group_size", weights.get("group_size"), None, -1)
        self._only(f"{at_weights}.symmetric", weights.get("symmetric", True), True)
        self._only(f"{at_weights}.dynamic", weights.get("dynamic", False), False)
        self._only(f"{at}.output_activations", group.get("output_activations"), None)
        if (given := group.get("input_activations")) is not None:
            self._check_activations(f"{at}.input_activations", self._mapping(f"{at}.input_activations", given), kind)
        return Form(
            "fp8" if kind == "float" else "int8",
            plain=plain,
            tensor=weights["strategy"] == "tensor",
            dynamic=given is not None,
        )

    def _check_activations(self, at: str, given: Mapping[str, Any], kind: str) -> None:
        self._only(f"{at}.num_bits", given.get("num_bits", 8), 8)
        self._only(f"{at}.type", given.get("type", "int"), kind)
        self._only(f"{at}.dynamic", given.get("dynamic", False), True)
        self._only(f"{at}.symmetric", given.get("symmetric", True), True)
        self._only(f"{at}.scale_dtype", given.get("scale_dtype"), None)
        hint = "with one scale for all tokens, what a request gets would depend on the others in its batch"
        self._only(f"{at}.strategy", given.get("strategy"), "token", hint=hint)

    def _patterns(self, at: str, given: Any) -> list[str]:
        if not (isinstance(given, list) and all(isinstance(item, str) for item in given)):
            raise self._refusal(at, given, "a list of texts")
        for item in given:
            if item.startswith("re:"):
                try:
                    re.compile(item.removeprefix("re:"))
                except re.error as error:
                    raise self._refusal(at, item, f"a regular expression; {error}") from error
            elif item[:1].isupper() and item != "Linear" and at != "ignore":  # a class
                raise self._refusal(at, item, "Linear, the name of a module, or re: and a pattern for names")
        return given

    def _mapping(self, at: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._refusal(at, value, "a mapping")
        return value

    def _only(self, at: str, value: Any, *valid: Any, hint: str = "") -> None:
        if not any(value == one and type(value) is type(one) for one in valid):
            raise self._refusal(at, value, " or ".join(_shown(one) for one in valid), hint)

    def _refusal(self, at: str, value: Any, valid: str, hint: str = "") -> UserError:
        shown = _shown(value)
        what = f"this version does not take a checkpoint with {at}={shown if len(shown) < 80 else shown[:80] + ' ...'}"
        return UserError(what, where=self._where(at), valid=valid, hint=hint)

    def _where(self, at: str) -> str:
        return f"{self._path}, quantization_config.{at}"


def _shown(value: Any) -> str:
    """As JSON has it; a text without its quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def _names(patterns: Iterable[str], module: str) -> bool:
    """Whether one of the patterns is for the linear layer called `module`."""
    return any(
        re.match(pattern.removeprefix("re:"), module) if pattern.startswith("re:") else pattern in ("Linear", module)
        for pattern in patterns
    )
