"""How a model's weights are loaded: what transformers makes of a config.json and of the names in a checkpoint."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Loading(BaseModel):
    """What `weights.loading` finds; it is data here, so that planning needs neither torch nor transformers.

    Attributes:
        hf_config: The fields of the config.json of the model that is built: the text part, the first layers, and with
            the dtype that the weights are loaded in.
        stored_as: The fields of the config.json of the model that transformers loads, where the checkpoint stores the
            parameters under other names or in another form than the model has them; None: it stores them as they are.
        copies: Names of two stored tensors which the model has as one. They may differ all the same.
        missing: Parameters that the checkpoint lacks.
        misshapen: Parameters of another shape: the name, the shape that is stored, the shape of the model.
        unused: Stored tensors that the model does not load.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    hf_config: dict[str, Any]
    stored_as: dict[str, Any] | None = None
    copies: list[tuple[str, str]] = []
    missing: list[str] = []
    misshapen: list[tuple[str, list[int], list[int]]] = []
    unused: list[str] = []
