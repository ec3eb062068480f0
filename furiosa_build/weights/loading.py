"""What transformers makes of a config.json and of the names in a checkpoint, before any tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from furiosa_build.ir.loading import Loading
from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.compressed_tensors import QuantizedCheckpoint
from furiosa_build.quant.scheme import scheme
from furiosa_build.weights.matching import Matching
from furiosa_build.weights.resolve_config import causal_model, resolve_config, whole_of
from furiosa_build.weights.text_part import TextPart


def find_loading(
    fields: Mapping[str, Any],
    layers: int | None,
    stored: Mapping[str, Layout] | None,
    stored_dtype: str | None,
    checkpoint: QuantizedCheckpoint | None,
) -> Loading:
    """How the weights of the model that `fields`, of its config.json, describe are loaded.

    Args:
        fields: Of config.json.
        layers: Take only so many decoder layers; None: all.
        stored: What the checkpoint stores; None: the weights are drawn, or their files are not here yet.
        stored_dtype: Its dtype, which counts where the config names none.
        checkpoint: Which weights it has quantized, if it has.

    Raises:
        UserError: transformers refuses the config, with its reason.
    """
    hf_config = resolve_config(fields, layers, stored_dtype)
    model = causal_model(hf_config)
    if stored is None:
        return Loading(hf_config=hf_config)
    whole = whole_of(fields)
    part = None if whole is None else TextPart(causal_model(whole), model)
    matching = Matching(model, stored, frozenset() if checkpoint is None else _parts(model, checkpoint), part)
    known = {_without_numbers(name) for name in stored if name not in set(matching.unused)}
    return Loading(
        hf_config=hf_config,
        stored_as=(whole or hf_config) if matching.converts else None,
        copies=matching.copies,
        missing=[] if checkpoint else matching.missing,
        misshapen=[] if checkpoint else matching.misshapen,
        # Further layers than are taken are not told of.
        unused=[n for n in matching.unexpected() if layers is None or _without_numbers(n) not in known],
    )


def _parts(model: PreTrainedModel, checkpoint: QuantizedCheckpoint) -> frozenset[str]:
    """The names of the tensors that the checkpoint stores for weights that it quantizes."""
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and (text := checkpoint.scheme_of(name := f"{path}.weight")) != "none":
            layout = Layout.of(module.weight)
            found |= {scheme(text).stored_name(name, part) for part in scheme(text).parts(layout)}
    return frozenset(found)


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)
