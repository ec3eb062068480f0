"""Section `model`: which model, and where its weights come from."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from furiosa_build.recipe.schema.section import PositiveInt, Section, invalid


class ModelSpec(Section):
    """Which model, where from, and how many of its layers.

    `architecture` holds the fields of the model's `config.json`. When absent they are read from the model's
    directory or fetched from the hub. `param_file_path` is a safetensors file that holds all parameters: then the
    directory or the hub gives config.json and the tokenizer's files only. `tokenizer`: the source's, if it has one, or
    none; without one an artifact takes and gives token ids.
    """

    model_id_or_path: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    num_hidden_layers: PositiveInt | None = None
    seed_for_random_weight: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    param_file_path: Annotated[str, Field(min_length=1)] | None = None
    tokenizer: Literal["source", "none"] = "source"
    calculate_logit_only_for_last_token: bool = False
    output_last_hidden_state: bool = False
    architecture: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> ModelSpec:
        if self.param_file_path is not None and self.seed_for_random_weight is not None:
            what = f"param_file_path={self.param_file_path!r} and seed_for_random_weight={self.seed_for_random_weight}"
            raise invalid(
                f"{what}: weights are either read or random", key=("param_file_path",), valid="one of the two"
            )
        return self
