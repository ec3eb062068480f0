"""The configuration types of the Furiosa LLM API, where that API has them."""

from __future__ import annotations

from typing import NamedTuple

from furiosa_build.recipe.schema import SchedulerConfig


class KvCacheSharingAcrossBeamsConfig(NamedTuple):
    """Beams of a beam search that share the KV cache of their prompt."""

    beam_width: int
    max_new_tokens: int


__all__ = ["KvCacheSharingAcrossBeamsConfig", "SchedulerConfig"]
