"""Section `quantization`: the scheme of every linear layer."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticKnownError

from furiosa_build.quant.scheme import exists, has_word, names, with_words
from furiosa_build.recipe.schema.section import Section, as_tuple, invalid


def _known(scheme: str) -> str:
    if not exists(scheme):
        *others, last = map(repr, names())
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
    return scheme


Scheme = Annotated[str, AfterValidator(_known)]
"""The name of a scheme of the registry (`furiosa_build.quant.scheme`)."""


class QuantizationRule(Section):
    """A scheme for some parameters: `match` is a shell pattern of names such as `model.layers.0.mlp.up_proj.weight`."""

    match: Annotated[str, Field(min_length=1)]
    scheme: Scheme


class QuantizationSpec(Section):
    """Quantization of linear layers, each by itself: the first rule that matches its weight wins, else `scheme`.

    `dynamic`, `group_size` and `symmetric` go for all schemes that leave them open; `lm_head` goes before all of it. Or
    a compressed-tensors checkpoint, of which the weights are taken as they are: `quantize_artifact_path`.
    """

    scheme: Scheme = "none"
    rules: Annotated[tuple[QuantizationRule, ...], BeforeValidator(as_tuple)] = ()
    dynamic: bool = False
    group_size: Literal[32, 64, 128] | None = None
    symmetric: bool = True
    lm_head: Literal["int8"] | None = None
    quantize_artifact_path: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _a_checkpoint_has_a_scheme_of_its_own(self) -> QuantizationSpec:
        if self.quantize_artifact_path is not None and (self.scheme != "none" or self.rules or self.lm_head):
            given = "rules have" if self.rules else f"lm_head={self.lm_head!r} has"
            given = f"scheme={self.scheme!r} has" if self.scheme != "none" else given
            what = f"quantize_artifact_path={self.quantize_artifact_path!r} is quantized already: {given} no effect"
            valid = "null, or quantization=none, which is scheme: none without rules"
            raise invalid(what, key=("quantize_artifact_path",), valid=valid)
        return self

    @model_validator(mode="after")
    def _some_scheme_has_each_choice(self) -> QuantizationSpec:
        families = dict.fromkeys([self.scheme, *(rule.scheme for rule in self.rules)])
        for key, word in self._words.items():
            if not any(has_word(family, word) for family in families):
                what = f"{key}={getattr(self, key)} has no effect on {' and '.join(families)}"
                raise invalid(what, key=(key,), valid="another scheme, such as quantization=int4, or no such key")
        return self

    @property
    def _words(self) -> dict[str, str]:
        """What the keys that were given add to the text of a scheme."""
        given = {
            "group_size": "" if self.group_size is None else str(self.group_size),
            "symmetric": "" if self.symmetric else "asymmetric",
            "dynamic": "dynamic" if self.dynamic else "",
        }
        return {key: word for key, word in given.items() if word}

    def scheme_of(self, parameter: str) -> str:
        """The scheme for the weight of the linear layer called `parameter`."""
        rules = (rule.scheme for rule in self.rules if fnmatch.fnmatchcase(parameter, rule.match))
        return with_words(next(rules, self.scheme), self._words.values())
