"""What a compressed-tensors checkpoint is, by its config.json alone: which weights have which scheme.

https://github.com/vllm-project/compressed-tensors defines the format. What this version cannot compute is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from furiosa_build.core.errors import UserError
from furiosa_build.ir.outline import Outline
from furiosa_build.quant.config_group import ConfigGroup, Refuser
from furiosa_build.quant.patterns import PREFIX, matches, problem
from furiosa_build.quant.scheme import QuantScheme, families, scheme

KEY = "quantization.quantize_artifact_path"

_FREE = re.compile(
    r"_.*|architectures|dtype|torch_dtype|use_cache|.*_token_id|transformers_version|quantization_config|compression_config|pad_.*"
)
"""Fields of a config.json that shape no number of the model, or are compared apart."""
_LINEAR = "Linear"
"""The target that stands for all linear layers."""


class QuantizedCheckpoint(NamedTuple):
    """Which linear layers of a checkpoint are quantized, and how.

    Attributes:
        targets: What is quantized -> its scheme, as text: `Linear` (all linear layers), a module's name, or `re:` and a
            pattern for the beginning of names.
        ignore: The same, for what is not quantized.
    """

    targets: Mapping[str, str]
    ignore: tuple[str, ...]

    def scheme_of(self, parameter: str) -> str:
        """The scheme of the weight of the linear layer called `parameter`, or `none`.

        As compressed-tensors decides: a module's name goes before a pattern, a pattern before `Linear`.
        """
        module = parameter.removesuffix(".weight")
        if any(name == _LINEAR or matches(name, module) for name in self.ignore):
            return "none"
        for target in sorted(self.targets, key=lambda target: (target == _LINEAR, target.startswith(PREFIX), target)):
            if target == _LINEAR or matches(target, module):
                return self.targets[target]
        return "none"

    @property
    def described(self) -> str:
        """The schemes, for a person."""
        return "; ".join(scheme(text).described for text in dict.fromkeys(self.targets.values()))


def quantization_config(
    schemes: Mapping[str, str], ignore: Sequence[str], embeddings: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """`quantization_config` for config.json, as compressed-tensors 0.1x and 0.2x read it.

    Args:
        schemes: Name of a quantized linear layer -> its scheme. One for all is written as a group for `Linear`, several
            as a group each that names its layers.
        ignore: The linear layers that are not quantized.
        embeddings: Name of a quantized embedding -> its scheme.
    """
    found = sorted(set(schemes.values()))
    groups = {}
    for number, text in enumerate(found):
        targets = [_LINEAR] if len(found) == 1 else sorted(name for name, own in schemes.items() if own == text)
        groups[f"group_{number}"] = {"targets": targets, **scheme(text).config_group()}
    for name, text in sorted((embeddings or {}).items()):
        groups[f"group_{len(groups)}"] = {"targets": [name], **scheme(text).config_group()}
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignore),
    }


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
    described = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(described, dict):
        raise UserError(
            "the checkpoint is not quantized: its config.json has no quantization_config",
            where=str(path),
            hint="weights that are not quantized are named by model.model_id_or_path",
        )
    _check_model(path, config, model, layers)
    return _read(path, described)


def check_quantizes(checkpoint: QuantizedCheckpoint, outline: Outline) -> None:
    """Raises UserError when the checkpoint quantizes nothing of the model."""
    if all(checkpoint.scheme_of(name) == "none" for name, p in outline.parameters.items() if p.linear):
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


def _read(path: Path, config: Mapping[str, Any]) -> QuantizedCheckpoint:
    """Raises UserError for the first thing that cannot be taken."""
    refuser = Refuser(path)
    refuser.only("quant_method", config.get("quant_method"), "compressed-tensors")
    # Older tools wrote `frozen`, or nothing, of weights that are compressed. Whether they are, their dtypes say.
    refuser.only("quantization_status", config.get("quantization_status"), "compressed", "frozen", None)
    refuser.only("kv_cache_scheme", config.get("kv_cache_scheme"), None)
    for key in ("transform_config", "sparsity_config"):
        if (given := config.get(key)) and not (isinstance(given, dict) and given.get("format") == "dense"):
            raise refuser.refusal(key, given, "nothing")
    groups = config.get("config_groups")
    if not (isinstance(groups, dict) and groups):
        raise refuser.refusal("config_groups", groups, "a mapping with a group for each scheme")
    targets: dict[str, str] = {}
    for name, group in groups.items():
        at = f"config_groups.{name}"
        if not isinstance(group, dict):
            raise refuser.refusal(at, group, "a mapping")
        found = _group_scheme(refuser, name, group, config.get("format")).text
        targets.update(dict.fromkeys(_names(refuser, f"{at}.targets", group.get("targets")), found))
    ignore = _names(refuser, "ignore", config.get("ignore") or [])
    return QuantizedCheckpoint(targets, tuple(ignore))


def _group_scheme(refuser: Refuser, name: str, group: Mapping[str, Any], format_of_all: Any) -> QuantScheme:
    """The scheme of a group, by the first family that takes it."""
    own = group.get("format")
    at, format_ = ("format", format_of_all) if own is None else (f"config_groups.{name}.format", own)
    known = families()
    refuser.only(at, format_, *dict.fromkeys(form for family in known for form in family.formats))
    given = ConfigGroup(refuser.path, name, group, format_)
    able = [family for family in known if format_ in family.formats]
    refused: list[UserError] = []
    for family in [family for family in able if family.claims(given)] or able:
        try:
            return family.read(given)
        except UserError as error:
            refused.append(error)
    raise refused[0]


def _names(refuser: Refuser, at: str, given: Any) -> list[str]:
    if not (isinstance(given, list) and all(isinstance(item, str) for item in given)):
        raise refuser.refusal(at, given, "a list of texts")
    for item in given:
        if item.startswith(PREFIX):
            if valid := problem(item):
                raise refuser.refusal(at, item, valid)
        elif item[:1].isupper() and item != _LINEAR and at != "ignore":  # a class
            raise refuser.refusal(at, item, "Linear, the name of a module, or re: and a pattern for names")
    return given
