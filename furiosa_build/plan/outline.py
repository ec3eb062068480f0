"""The outline of a model: its kinds of supertask, which layers each serves, and its parameters.

`models.survey` finds it by tracing; it is data here, so that planning needs no torch.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from furiosa_build.plan.cuts import Cut


class ParameterOutline(BaseModel):
    """One parameter as the model has it before quantization.

    `linear`: the weight of an untied linear layer. `cut`: how ranks share it; None: each has all of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    dtype: str
    shape: list[int]
    linear: bool
    cut: Cut | None = None


class KindOutline(BaseModel):
    """Layers that share programs.

    `signature` is the digest of their graphs at fixed sizes. `inputs` maps an argument of the layer to the tensor of
    the pipeline that it takes; `parameters` are relative to the layer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    layers: list[int]
    signature: str
    inputs: dict[str, str]
    parameters: list[str]
    cache_shape: list[int]


class Outline(BaseModel):
    """What planning needs to know of a model. `first_outputs` lists (layer, argument) after hidden_states."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    architecture: str
    dtype: str
    vocab_size: int
    layer_prefix: str
    blocks: list[KindOutline]
    first_outputs: list[tuple[int, str]]
    first_signature: str
    first_parameters: list[str]
    last_signature: str
    last_parameters: list[str]
    parameters: dict[str, ParameterOutline]

    @property
    def num_parameters(self) -> int:
        """How many numbers the model's parameters are; a tied one counts once."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters.values())
