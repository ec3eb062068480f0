"""The outline of a model: its kinds of supertask, which layers each serves, and its parameters.

`models.survey` finds it by tracing; it is data here, so that planning needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from furiosa_build.ir.kv_cache import KvCacheDtype, slot_layout
from furiosa_build.ir.sharding import Cut
from furiosa_build.ir.tensors import Layout


class ParameterOutline(BaseModel):
    """One parameter as the model has it before quantization.

    `linear`: the weight of an untied linear layer. `cut`: how ranks share it; None: each has all of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    dtype: str
    shape: list[int]
    linear: bool
    cut: Cut | None = None

    @property
    def layout(self) -> Layout:
        """dtype and shape before quantization."""
        return Layout(self.dtype, tuple(self.shape))


class RotaryLimit(BaseModel):
    """Rotary tables that depend on the length of the sequence: up to `longest` tokens they are constant."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    rope_type: str
    longest: int


class KindOutline(BaseModel):
    """Layers that share programs.

    `signature` is the digest of their graphs at fixed sizes. `inputs` maps an argument of the layer to the tensor of
    the pipeline that it takes; `parameters` are relative to the layer. `cache_shape` is [KV heads, size of a head];
    `value_size` is that of values, where it is another than that of keys.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    layers: list[int]
    signature: str
    inputs: dict[str, str]
    parameters: list[str]
    cache_shape: list[int]
    value_size: int | None = Field(default=None, exclude_if=lambda size: size is None)

    def rank_slots(self, ranks: int, dtype: str, kv_cache_dtype: KvCacheDtype) -> tuple[Layout, Layout]:
        """What one of `ranks` ranks keeps of a token, of its keys and of its values, where the model is of `dtype`."""
        heads, size = self.cache_shape
        own = max(heads // ranks, 1)
        keys, values = (slot_layout(kv_cache_dtype, dtype, (own, n)) for n in (size, self.value_size or size))
        return keys, values


class Outline(BaseModel):
    """What planning needs to know of a model. `first_outputs` lists (layer, argument) after hidden_states.

    `rotary_limit`: how long sequences may be, where the rotary tables of longer ones depend on their length. `head`:
    the matrix that logits are the product with, if it can be quantized: of a linear layer and perhaps an embedding.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
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
    rotary_limit: RotaryLimit | None = Field(default=None, exclude_if=lambda limit: limit is None)
    head: str | None = Field(default=None, exclude_if=lambda head: head is None)

    def stage_parameters(self, stages: Sequence[Sequence[int]], stage: int) -> list[str]:
        """The parameters that a stage needs, in order; `stages` has the layers of each. A tied one may be in two."""
        first = set(self.first_parameters) if stage == 0 else set()
        last = set(self.last_parameters) if stage == len(stages) - 1 else set()
        prefixes = tuple(f"{self.layer_prefix}{layer}." for layer in stages[stage])
        return [name for name in self.parameters if name in first | last or name.startswith(prefixes)]

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return sum(len(kind.layers) for kind in self.blocks)

    @property
    def num_parameters(self) -> int:
        """How many numbers the model's parameters are; a tied one counts once."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters.values())
