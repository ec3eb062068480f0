"""Section `quantization`."""

from __future__ import annotations

import fnmatch
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from furiosa_build.recipe.schema.section import Section, as_tuple, invalid

Scheme = Literal["none", "fp8", "int8"]


class QuantizationRule(Section):
    """`match` is a shell pattern over parameter names such as `model.layers.0.mlp.up_proj.weight`."""

    match: Annotated[str, Field(min_length=1)]
    scheme: Scheme


class QuantizationSpec(Section):
    """Weight-only quantization of linear layers: the first rule that matches wins, else `scheme`.

    Or a compressed-tensors checkpoint, of which the weights are taken as they are: `quantize_artifact_path`.
    """

    scheme: Scheme = "none"
    rules: Annotated[tuple[QuantizationRule, ...], BeforeValidator(as_tuple)] = ()
    quantize_artifact_path: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _a_checkpoint_has_a_scheme_of_its_own(self) -> QuantizationSpec:
        if self.quantize_artifact_path is not None and (self.scheme != "none" or self.rules):
            given = f"scheme={self.scheme!r} has" if self.scheme != "none" else "rules have"
            what = f"quantize_artifact_path={self.quantize_artifact_path!r} is quantized already: {given} no effect"
            valid = "null, or quantization=none, which is scheme: none without rules"
            raise invalid(what, key=("quantize_artifact_path",), valid=valid)
        return self

    @model_validator(mode="after")
    def _one_scheme(self) -> QuantizationSpec:
        for index, rule in enumerate(self.rules):
            if rule.scheme not in ("none", self.scheme):
                raise invalid(
                    f"the rule's scheme {rule.scheme!r} mixes with scheme={self.scheme!r}: "
                    "a checkpoint has one quantized format",
                    key=("rules", index, "scheme"),
                    valid=" or ".join(sorted({"'none'", repr(self.scheme)})),
                )
        return self

    def scheme_of(self, parameter: str) -> Scheme:
        """The scheme for the weight of the linear layer called `parameter`."""
        for rule in self.rules:
            if fnmatch.fnmatchcase(parameter, rule.match):
                return rule.scheme
        return self.scheme
