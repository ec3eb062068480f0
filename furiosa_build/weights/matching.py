"""Which stored tensors become which parameters: transformers' own renaming and conversion, tensor by tensor.

As `from_pretrained` does it: names are renamed by the mapping of the model's type, a prefix of the base model is added
or taken away, and tensors that a converter names are put together or taken apart (experts that are stored one by one).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from furiosa_build.ir.tensors import Layout
from furiosa_build.weights.text_part import TextPart

_COMPUTED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Tables that older versions of transformers stored, and that are computed."""


@dataclass
class Group:
    """Stored tensors that are converted together.

    Attributes:
        target: The parameter, or the first of several.
        converter: How; None: the first tensor is the parameter as it is.
        stored: Their names, each with the pattern of the converter that it matches.
    """

    target: str
    converter: WeightConverter | None
    stored: list[tuple[str, str]] = field(default_factory=list)

    def convert(self, read: Callable[[str], Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """The parameters that are made of these tensors, by name."""
        if self.converter is None:
            return {self.target: read(self.stored[0][1])}
        converter = deepcopy(self.converter)
        for pattern, name in self.stored:
            converter.add_tensor(self.target, name, pattern, partial(read, name))  # type: ignore[arg-type]
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


class Matching:
    """The stored tensors of a checkpoint, matched to the parameters of a model.

    Args:
        model: On the meta device.
        stored: dtype and shape of what is stored, by name.
        others: Names that are stored for a parameter beside those of the state dict: the parts of quantized weights.
        part: What the model is the text part of, where the checkpoint is that of a whole multimodal model.

    Attributes:
        groups: What is loaded.
        unused: Stored names that no parameter is made of.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stored: Mapping[str, Layout],
        others: frozenset[str] = frozenset(),
        part: TextPart | None = None,
    ) -> None:
        self.model, self._stored, self._part = model, stored, part or TextPart(model, model)
        self._expected: dict[str, Tensor | None] = {**model.state_dict()}
        self.groups: list[Group] = []
        self.unused: list[str] = []
        self._match(dict.fromkeys(others, torch.empty(0, device="meta")))

    def _match(self, others: Mapping[str, Tensor]) -> None:
        part, whole = self._part, self._part.whole
        expected = {**whole.state_dict(), **{part.name_in_whole(name): tensor for name, tensor in others.items()}}
        prefix, mapping = whole.base_model_prefix, get_model_conversion_mapping(whole)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        found: dict[str, Group] = {}
        for name in sorted(self._stored, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if renamed not in expected and name in expected:
                renamed, pattern = rename_source_key(name, [], [], prefix, expected)
            if renamed not in expected:
                self.unused.append(name)
                continue
            target = part.name_in_text(renamed)
            if target is None:
                continue
            converter = None if pattern is None else by_pattern[pattern]
            group = found.setdefault(target, Group(target, converter))
            group.stored.append((pattern or name, name))
        self.groups = list(found.values())

    @cached_property
    def made(self) -> dict[str, tuple[Group, Tensor]]:
        """The parameters that are made, each with its group and, on the meta device, as it comes out."""
        return {
            name: (group, tensor)
            for group in self.groups
            for name, tensor in group.convert(self._on_meta(group), self.model).items()
        }

    def _on_meta(self, group: Group) -> Callable[[str], Tensor]:
        like = self._expected.get(group.target)
        dtype = torch.float32 if like is None else like.dtype
        return lambda name: torch.empty(self._stored[name].shape, dtype=dtype, device="meta")

    @cached_property
    def origins(self) -> dict[str, str]:
        """Parameter -> the one that its values are taken of: another where the model ties the two, else itself."""
        origins = {name: name for name in self.made}
        for target, source in self.model.all_tied_weights_keys.items():
            if source not in self.made and target in self.made:
                origins[source] = target
            elif source in self.made and target not in self.made:
                origins[target] = source
        return origins

    @property
    def copies(self) -> list[tuple[str, str]]:
        """The stored tensors of parameters that the model ties, where the checkpoint has both."""
        tied = self.model.all_tied_weights_keys.items()
        both = [(self.made[a][0], self.made[b][0]) for a, b in tied if a in self.made and b in self.made]
        return [(one.stored[0][1], other.stored[0][1]) for one, other in both]

    @property
    def missing(self) -> list[str]:
        """Parameters that are not made, but for those that transformers does not miss either."""
        ignored = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        return [
            name
            for name, _ in self.model.named_parameters()
            if name not in self.origins and not any(pattern.search(name) for pattern in ignored)
        ]

    @property
    def misshapen(self) -> list[tuple[str, list[int], list[int]]]:
        """Parameters that come out in another shape than the model's."""
        return [
            (name, list(tensor.shape), list(expected.shape))
            for name, (_, tensor) in self.made.items()
            if (expected := self._expected.get(name)) is not None and tensor.shape != expected.shape
        ]

    @property
    def converts(self) -> bool:
        """Whether the stored tensors are not the parameters as they are, under their names."""
        return any(group.converter is not None or group.target != group.stored[0][1] for group in self.groups) or any(
            name != origin for name, origin in self.origins.items() if name in dict(self.model.named_parameters())
        )

    def unexpected(self) -> list[str]:
        """The unused ones of which transformers warns."""
        ignored = [*(self.model._keys_to_ignore_on_load_unexpected or ()), *_COMPUTED]
        return [name for name in self.unused if not any(re.search(pattern, name) for pattern in ignored)]
