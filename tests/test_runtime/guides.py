"""Guides of the quickstart model's tokenizer, and texts drawn from what they allow."""

from __future__ import annotations

import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from furiosa_build.runtime.sampling.guided import Guide, Guides
from furiosa_build.runtime.sampling.params import SamplingParams

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
VOCAB = 2048  # of the quickstart model's tokenizer
END = 0


def make(guides: Guides, **guided: Any) -> Guide:
    guide = guides.make(SamplingParams(**guided))
    assert guide is not None
    return guide


def wander(guide: Guide, seed: int, most: int = 3000, closers: Collection[int] = ()) -> list[int]:
    """Tokens drawn from the allowed ones alike, but the end, and then the closers, every other time they may be."""
    source, tokens = random.Random(seed), list[int]()
    while not guide.is_complete:
        assert guide.error is None
        allowed = np.flatnonzero(guide.allowed).tolist()
        if END in allowed and (allowed == [END] or source.random() < 0.5):
            break
        closing = [token for token in allowed if token in closers]
        choices = closing if closing and source.random() < 0.5 else [token for token in allowed if token != END]
        tokens.append(source.choice(choices))
        guide.advance(tokens[-1])
        assert len(tokens) < most, "does not end"
    return tokens
