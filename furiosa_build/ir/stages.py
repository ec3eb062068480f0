"""Pipeline stages: which layers each has."""

from __future__ import annotations

from itertools import pairwise


def split_layers(layers: int, stages: int) -> list[range]:
    """The layers of each stage, in order: as many for each, the first ones one more if need be."""
    share, more = divmod(layers, stages)
    ends = [stage * share + min(stage, more) for stage in range(stages + 1)]
    return [range(begin, end) for begin, end in pairwise(ends)]
