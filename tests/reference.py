"""transformers as the reference: what its `generate` gives for one prompt.

Each prompt alone: padding to a common length would bring in transformers' masks and positions for padding, which are a
matter of their own, and of no use as a reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

MARGIN = 1e-4
"""Premise of comparing tokens: no choice is so close that float32 rounding (up to 3e-5 in the logits) turns it."""

Beams = list[tuple[list[int], float]]
"""(tokens, score) of each beam, the best first."""


def greedy(model: Any, prompt: Sequence[int], new: int) -> list[int]:
    """The greedy continuation of `prompt` by `new` tokens; each is ahead of the next best by more than MARGIN."""
    result = _generate(model, prompt, max_new_tokens=new, eos_token_id=None, output_logits=True)
    best = torch.stack(result.logits)[:, 0].topk(2).values
    assert float((best[:, 0] - best[:, 1]).min()) > MARGIN
    return list(result.sequences[0, len(prompt) :].tolist())


def beams(model: Any, prompt: Sequence[int], new: int, width: int, ends: Sequence[int] = (), **options: Any) -> Beams:
    """The beams of up to `new` tokens; `ends` are the end tokens, and kept."""
    result = _generate(
        model,
        prompt,
        max_new_tokens=new,
        num_beams=width,
        num_return_sequences=width,
        eos_token_id=list(ends) or None,
        output_scores=True,
        **options,
    )
    found = []
    for row, score in zip(result.sequences[:, len(prompt) :].tolist(), result.sequences_scores.tolist(), strict=True):
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        found.append((row[:length], score))
    return found


def _generate(model: Any, prompt: Sequence[int], **options: Any) -> Any:
    return model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
        do_sample=False,
        pad_token_id=2,
        return_dict_in_generate=True,
        **options,
    )
