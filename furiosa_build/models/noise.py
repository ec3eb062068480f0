"""Random weights that take little memory, to look at what a model does with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from furiosa_build.models.skeleton import Skeleton


def cheap_noise(shape: Sequence[int], seed: int, scale: float = 1.0) -> Tensor:
    """Random numbers of a parameter's shape, whose rows overlap in memory: a matrix takes no more than two vectors."""
    generator = torch.Generator().manual_seed(seed)
    numbers = scale * torch.randn(sum(shape) or 1, generator=generator)
    return numbers.as_strided(tuple(shape), (1,) * len(shape))


@contextmanager
def headless(skeleton: Skeleton) -> Iterator[None]:
    """Within, nothing is multiplied by the output embeddings, which are large."""
    head = skeleton.model.get_output_embeddings() or nn.Identity()
    head.forward = lambda states: states  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward
