"""Weights under the names and in the form that the model has, made of what a checkpoint stores as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from furiosa_build.ir.tensors import Layout
from furiosa_build.weights.matching import Group, Matching
from furiosa_build.weights.resolve_config import causal_model
from furiosa_build.weights.source import TensorSource
from furiosa_build.weights.text_part import TextPart


class Converted:
    """The parameters of a model, by their names in its state dict, from a checkpoint that stores them otherwise.

    At most the tensors of one conversion are in memory: those that were made last.

    Args:
        source: What is stored.
        hf_config: The fields of the model's config.json.
        stored_as: Those of the model that transformers loads: itself, or one that it is the text part of.
        parts: Names of parts of quantized weights, which are stored beside what is in the state dict.
    """

    def __init__(
        self,
        source: TensorSource,
        hf_config: Mapping[str, Any],
        stored_as: Mapping[str, Any],
        parts: frozenset[str] = frozenset(),
    ) -> None:
        self._source = source
        stored = {name: source.layout(name) for name in source.names()}
        model = causal_model(hf_config)
        part = None if stored_as == hf_config else TextPart(causal_model(stored_as), model)
        self._matching = Matching(model, stored, parts, part)
        self._last: tuple[Group, dict[str, Tensor]] | None = None

    def names(self) -> set[str]:
        return {*self._matching.origins, *self._matching.unused}

    def layout(self, name: str) -> Layout:
        if name not in self._matching.origins:
            return self._source.layout(name)
        group, tensor = self._made(name)
        return Layout(self._dtype_of(group), tuple(tensor.shape))

    def read(self, name: str) -> Tensor:
        if name not in self._matching.origins:
            return self._source.read(name)
        group, _ = self._made(name)
        if group.converter is None:
            return self._source.read(group.stored[0][1])
        if self._last is None or self._last[0] is not group:
            self._last = None  # frees it before the next is made
            dtype = getattr(torch, self._dtype_of(group))
            made = group.convert(lambda stored: self._source.read(stored).to(dtype), self._matching.model)
            self._last = (group, made)
        return self._last[1][self._matching.origins[name]]

    def _made(self, name: str) -> tuple[Group, Tensor]:
        return self._matching.made[self._matching.origins[name]]

    def _dtype_of(self, group: Group) -> str:
        """The dtype that tensors which are put together have in common: the widest."""
        found = {self._source.layout(name).dtype for _, name in group.stored}
        if len(found) == 1:
            return found.pop()
        dtype = torch.bool
        for name in found:
            dtype = torch.promote_types(dtype, getattr(torch, name))
        return str(dtype).removeprefix("torch.")
