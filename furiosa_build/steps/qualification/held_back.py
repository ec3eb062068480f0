"""transformers' own loading of a model, from which the decoder layers are held back until they are asked for.

`from_pretrained` chooses the files and finds what becomes of each stored tensor; that of a layer it puts on the meta
device. For the layer itself the same function of transformers is called again with the layer's stored tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from furiosa_build.core.errors import StepError
from furiosa_build.steps.qualification.text_part import place_of_layers
from furiosa_build.steps.qualification.transformers_calls import loading, quietly

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LayersHeldBack:
    """The layers of a model that is loaded without them.

    Args:
        layers: Where the decoder layers are in the language model: `model.layers`.

    Attributes:
        place: Where they are in the model that transformers loads.
    """

    def __init__(self, layers: str) -> None:
        self.place = layers
        self._model: PreTrainedModel | None = None
        self._stored: dict[int, dict[str, Any]] = {}

    @contextmanager
    def at_loading(self) -> Iterator[None]:
        """Within, `from_pretrained` loads no layer. Raises StepError where that cannot be had."""
        from transformers import modeling_utils

        module: Any = modeling_utils
        usual = module.convert_and_load_state_dict_in_model

        def load_outside(model: PreTrainedModel, state_dict: Mapping[str, Any], load_config: Any, **others: Any) -> Any:
            self.place = place_of_layers(model, self.place)
            self._model, self._load_config, self._convert = model, load_config, usual
            self._stored = self._by_layer(model, state_dict, load_config)
            devices = {"": "cpu", f"{self.place}.": "meta"}
            return usual(model, dict(state_dict), replace(load_config, device_map=devices), **others)

        module.convert_and_load_state_dict_in_model = load_outside
        try:
            yield
        finally:
            module.convert_and_load_state_dict_in_model = usual
        if self._model is None:
            raise StepError("qualify", "this version of transformers loads weights in a way that is not known here")

    def load(self, number: int) -> None:
        """Gives a layer of the model its parameters. Raises StepError where transformers does not make all of them."""
        assert self._model is not None
        with quietly(), loading(f"layer {number}"):
            found, _ = self._convert(self._model, self._stored.get(number, {}), self._load_config)
        layer = self._model.get_submodule(f"{self.place}.{number}")
        absent = [name for name, tensor in layer.state_dict(keep_vars=True).items() if tensor.is_meta]
        wrong = [*absent, *(name for name, *_ in found.mismatched_keys), *found.conversion_errors]
        if wrong:
            raise StepError("qualify", f"transformers cannot load {wrong[0]} of layer {number} of the source by itself")

    def _by_layer(
        self, model: PreTrainedModel, state_dict: Mapping[str, Any], load_config: Any
    ) -> dict[int, dict[str, Any]]:
        """The stored tensors of each layer, by their names in the files. One that is of no layer is left out."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        mapping, expected = load_config.weight_mapping or [], model.state_dict()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        found: dict[int, dict[str, Any]] = {}
        for name, stored in state_dict.items():
            renamed, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
            if renamed not in expected and name in expected:
                renamed, _ = rename_source_key(name, [], [], model.base_model_prefix, expected)
            number, _, _ = renamed.removeprefix(f"{self.place}.").partition(".")
            if renamed.startswith(f"{self.place}.") and number.isdigit():
                found.setdefault(int(number), {})[name] = stored
        return found
