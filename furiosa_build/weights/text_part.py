"""The text part of a multimodal model as a causal language model of its own: the same parameters under other names."""

from __future__ import annotations

from transformers import PreTrainedModel

from furiosa_build.core.errors import UserError


class TextPart:
    """How the names of a causal language model's parameters are related to those of a model that it is a part of.

    Args:
        whole: The model that transformers loads, on the meta device.
        text: A model of its text part, or the same model.

    Raises:
        UserError: The parameters of `text` are not some of those that `whole` has.
    """

    def __init__(self, whole: PreTrainedModel, text: PreTrainedModel) -> None:
        self.whole = whole
        self._prefix = self._path = f"{text.base_model_prefix}."
        self._children = {name for name, _ in text.named_children()}
        if whole is text:
            return
        body = type(text.base_model)
        paths = [path for path, module in whole.named_modules() if type(module) is body]
        self._path = f"{paths[0]}." if len(paths) == 1 else ""
        shapes = {name: tensor.shape for name, tensor in whole.state_dict().items()}
        others = [
            name for name, tensor in text.state_dict().items() if shapes.get(self.name_in_whole(name)) != tensor.shape
        ]
        if not self._path or others:
            lacking = others[0] if self._path else f"one {body.__name__}"
            raise UserError(
                f"model_type {whole.config.model_type!r} is not supported: transformers makes a {type(whole).__name__} "
                f"of it, of which a {type(text).__name__} is no part (it has not {lacking})",
                where="config.json, model_type",
                valid="a model type whose text part is a causal language model",
            )

    def name_in_whole(self, name: str) -> str:
        """What the whole model calls a parameter of its text part."""
        return self._path + name.removeprefix(self._prefix) if name.startswith(self._prefix) else name

    def name_in_text(self, name: str) -> str | None:
        """What the text part calls a parameter of the whole model; None: it has not this one."""
        if name.startswith(self._path):
            return self._prefix + name.removeprefix(self._path)
        is_in_both = name.partition(".")[0] in self._children and not name.startswith(self._prefix)
        return name if is_in_both else None
