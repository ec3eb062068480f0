"""Section `speculative`: the draft model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from furiosa_build.recipe.schema.section import PositiveInt, Section, invalid


class SpeculativeSpec(Section):
    """Speculative decoding: a smaller model proposes tokens, which the model itself verifies several at a time.

    Attributes:
        recipe: The name of the recipe that the draft model is built by (`recipe.draft`). None: no draft model.
        num_speculative_tokens: Tokens that it proposes at a time; by default `DEFAULT_SPECULATIVE_TOKENS`.
    """

    recipe: Annotated[str, Field(min_length=1)] | None = None
    num_speculative_tokens: PositiveInt | None = None

    @model_validator(mode="after")
    def _has_an_effect(self) -> SpeculativeSpec:
        if self.recipe is None and self.num_speculative_tokens is not None:
            what = f"num_speculative_tokens={self.num_speculative_tokens}: there is no draft model to propose them"
            raise invalid(what, key=("num_speculative_tokens",), valid="null, or speculative.recipe=NAME")
        return self


DEFAULT_SPECULATIVE_TOKENS = 4
"""Proposed tokens by default. With an acceptance rate of 0.7, a step gives 2.8 tokens with 4 proposed and at most 3.3
with any number: each one beyond 4 costs a run of the draft and gives less than 0.2 tokens."""
