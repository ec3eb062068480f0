"""A segment: consecutive parts of the forward pass that become one supertask."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Segment(BaseModel):
    """Consecutive parts of the forward pass that become one supertask.

    Attributes:
        first: It begins with what comes before the layers, and takes `input_ids`; else it takes `hidden_states`.
        layers: Decoder layers.
        last: It ends with what comes after the layers, and gives `logits`; else it gives `hidden_states`.
        slices: What follows attention in the last of `layers` is computed for each prompt's last token only, as is all
            that comes after.
        is_sliced: What comes in is one token of each prompt already.
        arguments: For each layer: argument -> the program's input for it. Empty: inputs are called as the arguments.
        outputs: Tensors given beside `hidden_states`: the layer and argument that each is passed to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    first: bool = False
    layers: tuple[int, ...] = ()
    last: bool = False
    slices: bool = False
    is_sliced: bool = False
    arguments: tuple[dict[str, str], ...] = ()
    outputs: tuple[tuple[int, str], ...] = ()
