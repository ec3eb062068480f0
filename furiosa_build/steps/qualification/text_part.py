"""Where the parts of a model are in the one that transformers loads, which may take images too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from furiosa_build.core.errors import StepError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def place_of(model: PreTrainedModel, path: str) -> str | None:
    """Where a module of the language model is, by its path in that: `model.layers`. None: nowhere."""
    places = dict(model.named_modules())
    if path in places:
        return path
    inside = dict(model.get_decoder().named_modules()).get(path.partition(".")[2])
    return next((place for place, module in places.items() if module is inside), None)


def place_of_layers(model: PreTrainedModel, path: str) -> str:
    """The same of its decoder layers. Raises StepError where it has none there."""
    if (place := place_of(model, path)) is None:
        raise StepError("qualify", f"the source's model, as transformers makes it, has no {path}")
    return place
