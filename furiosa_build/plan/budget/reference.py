"""What the reference of `qualify` takes of memory beside weights: what it computes, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from furiosa_build.ir.dtypes import ITEMSIZE
from furiosa_build.ir.outline import Outline

LENGTHS = (2048, 1024, 512, 256)
"""Tokens of the longest prompt: the first that there is memory for, at least the last. Attention takes their square."""
_LOGIT = 4
"""Bytes of a logit: they are compared in float32."""
_MOST_TEXT = 1024
_MOST_LOGITS = 1 << 26
"""Logits of a text by one model, which are held until those of the other are there."""
_FLOATING_POINT_OPERATIONS = 1e13
"""About what one model may spend on the text. It is 2 for each parameter and token."""


def working_bytes(outline: Outline, hf_config: Mapping[str, Any], length: int) -> int:
    """What one layer of the reference takes for a sequence: scores of its eager attention, and its widest numbers.

    While their softmax is found, scores are there twice in float32, and in the model's dtype if that is another.
    """
    itemsize = ITEMSIZE[outline.dtype]
    score = 2 * 4 + (0 if outline.dtype == "float32" else itemsize)
    heads = max(int(hf_config.get("num_attention_heads") or 0), *(kind.cache_shape[0] for kind in outline.blocks))
    inside = (p.shape for name, p in outline.parameters.items() if name.startswith(outline.layer_prefix))
    widest = max(size for shape in inside for size in shape[-2:])
    return heads * length**2 * score + 4 * length * widest * itemsize


def logits_bytes(outline: Outline, positions: int) -> int:
    """Logits of so many positions: the artifact's, and the reference's with and without rounding."""
    return 3 * positions * outline.vocab_size * _LOGIT


def text_tokens(parameters: int, vocab: int) -> int:
    """Tokens of a text that a quantized model of so many parameters is measured on: what takes a minute or so."""
    return max(64, min(_MOST_TEXT, _MOST_LOGITS // vocab, int(_FLOATING_POINT_OPERATIONS / (2 * parameters))))


def text_bytes(outline: Outline) -> int:
    """Logits of such a text by two models, and probabilities of a piece of it."""
    tokens = text_tokens(outline.num_parameters, outline.vocab_size)
    return 3 * tokens * outline.vocab_size * _LOGIT
