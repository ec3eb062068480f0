"""Where the parts of a model are in the one that transformers loads, which may take images too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def place_of(model: PreTrainedModel, path: str) -> str | None:
    """Where a module of the language model is, by its path in that: `model.layers`. None: nowhere."""
    places = dict(model.named_modules())
    if path in places:
        return path
    inside = dict(model.get_decoder().named_modules()).get(path.partition(".")[2])
    return next((place for place, module in places.items() if module is inside), None)
