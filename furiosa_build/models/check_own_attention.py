"""Checks that a layer with attention of its own gives over a paged cache what it gives in transformers.

Chunks of sequences run both ways with the same random weights: after transformers' own cache, one sequence at a time;
and as programs run them, side by side, over contexts whose slots are scattered and longer than the sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from furiosa_build.models.attention import PagedCache
from furiosa_build.models.noise import cheap_noise, headless
from furiosa_build.models.own_attention import keeping
from furiosa_build.models.refusals import refusal
from furiosa_build.models.skeleton import LayerCall, Skeleton, fill, functional, structure

FAR = 2048
"""Tokens of a context that is longer than windows are."""
GARBAGE = 100.0
"""What slots hold that are of no sequence: an attention that looks at them is far off."""


@dataclass(frozen=True)
class Chunk:
    """New tokens of sequences that run side by side, in a bucket of `query` new tokens over `context`."""

    pasts: tuple[int, ...]
    query: int
    context: int


def check_own_attention(skeleton: Skeleton) -> None:
    """Raises UserError, with the reason, when a layer is not supported."""
    far = min(skeleton.longest, FAR)
    chunks = [
        Chunk((0, 0), 11, 11),
        Chunk((5, 9), 4, 24),
        Chunk((5, 10), 1, 24),
        Chunk((3, far - 4), 4, far),
        Chunk((7, far - 1), 1, far),
    ]
    chunks = [chunk for chunk in chunks if chunk.context <= far]
    check, seen = _Check(skeleton), set()
    for layer, likeness in enumerate(check.likenesses()):
        if likeness not in seen:
            seen.add(likeness)
            check.run(layer, chunks)


class _Check:
    """The layers of a model with random weights, run in both ways."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton
        self._implementation = str(skeleton.model.config._attn_implementation)
        self._outer = {
            name: _noise(p.shape, seed) for seed, (name, p) in enumerate(skeleton.outer_parameters().items())
        }

    def likenesses(self) -> list[str]:
        """Of each layer what is equal for those that need to be looked at only once."""
        calls = self._calls(torch.zeros((1, 2), dtype=torch.int64), torch.arange(2)[None], 2)
        numbers: dict[int, int] = {}
        return [
            f"{structure(layer)}{[(name, numbers.setdefault(id(t), len(numbers))) for name, t in call.tensors.items()]}"
            for layer, call in zip(self._skeleton.layers, calls, strict=True)
        ]

    def run(self, layer: int, chunks: Sequence[Chunk]) -> None:
        """Compares a layer in both ways, for each chunk."""
        name = f"{type(self._skeleton.layers[layer]).__name__} (layer {layer})"
        shapes = self._check_alone(layer, name)
        for chunk in chunks:
            generator = torch.Generator().manual_seed(chunk.context)
            pasts = [
                tuple(torch.randn((1, heads, tokens, size), generator=generator) for heads, size in shapes)
                for tokens in chunk.pasts
            ]
            ids = torch.randint(self._skeleton.vocab_size, (len(pasts), chunk.query), generator=generator)
            found = self._over_slots(layer, ids, chunk, pasts)
            for row, (keys, values) in enumerate(pasts):
                expected, by_eager = (
                    self._after_cache(layer, ids[row : row + 1], self._cache(layer, keys, values), implementation)
                    for implementation in (self._implementation, "eager")
                )
                if not _agree(expected, by_eager):
                    raise refusal(
                        f"transformers has two attentions for {name}, {self._implementation} and eager, which do not "
                        "give the same"
                    )
                if not _agree(expected, [each[row : row + 1] for each in found]):
                    raise refusal(
                        f"{name} has attention of its own, which over a paged KV cache gives something else, such as "
                        f"for {chunk.query} tokens after {chunk.pasts[row]} in a context of {chunk.context}"
                    )

    def _check_alone(self, layer: int, name: str) -> list[tuple[int, int]]:
        """Checks a layer in transformers; returns heads and size of keys and of values that it keeps of a token."""
        cache = DynamicCache(config=self._skeleton.config)
        ids = torch.arange(6)[None] % self._skeleton.vocab_size
        whole = self._after_cache(layer, ids, cache, self._implementation)
        kept = cache.layers[layer] if layer < len(cache.layers) else None
        if not isinstance(kept, DynamicLayer) or kept.keys is None or kept.values is None or kept.keys.shape[2] != 6:
            raise refusal(f"{name} does not keep keys and values of each token, so it cannot have a paged KV cache")
        cache = DynamicCache(config=self._skeleton.config)
        beginning = self._after_cache(layer, ids[:, :4], cache, self._implementation)
        if not _agree(beginning, [each[:, :4] for each in whole]):
            raise refusal(f"{name} attends to tokens that come later")
        return [(each.shape[1], each.shape[3]) for each in (kept.keys, kept.values)]

    def _cache(self, layer: int, keys: Tensor, values: Tensor) -> DynamicCache:
        """transformers' cache with what came before."""
        cache = DynamicCache(config=self._skeleton.config)
        if keys.shape[2]:
            for number in {0, layer}:  # the model learns from the first one how long the past is
                cache.update(keys, values, number)
        return cache

    def _after_cache(self, layer: int, ids: Tensor, cache: DynamicCache, implementation: str) -> tuple[Tensor, Tensor]:
        """What comes into a layer and out of it, for new tokens of one sequence, as transformers runs it."""
        past = cache.get_seq_length()
        positions = torch.arange(past, past + ids.shape[1])[None]
        config = self._skeleton.model.config
        config._attn_implementation = implementation
        try:
            return self._through(layer, self._calls(ids, positions, cache)[layer])
        finally:
            config._attn_implementation = self._implementation

    def _over_slots(
        self, layer: int, ids: Tensor, chunk: Chunk, pasts: Sequence[tuple[Tensor, ...]]
    ) -> tuple[Tensor, Tensor]:
        """The same for several rows, as a program runs it."""
        lengths = torch.tensor(chunk.pasts)[:, None]
        positions = lengths + torch.arange(chunk.query)
        order = torch.randperm(ids.shape[0] * chunk.context, generator=torch.Generator().manual_seed(0))
        slots = 1 + order.reshape(ids.shape[0], chunk.context)
        key_cache, value_cache = (torch.full((slots.numel() + 1, *p.shape[1::2]), GARBAGE) for p in pasts[0])
        for row, (keys, values) in enumerate(pasts):
            own = slots[row, : chunk.pasts[row]]
            key_cache[own], value_cache[own] = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        used = torch.arange(chunk.context) < lengths + chunk.query
        paged = PagedCache(
            key_cache=key_cache,
            value_cache=value_cache,
            slot_mapping=slots.gather(1, positions),
            context_slots=None if chunk.query == chunk.context else torch.where(used, slots, 0),
        )
        with keeping(paged.keep):
            return self._through(layer, self._calls(ids, positions, chunk.context)[layer])

    def _calls(self, ids: Tensor, positions: Tensor, past: DynamicCache | int) -> list[LayerCall]:
        """How layers are called: after a cache of transformers, or over a context of so many slots."""
        skeleton, calls = self._skeleton, list[LayerCall]()

        def run() -> Tensor:
            calls.extend(
                skeleton.record_layer_calls(ids, positions, past)
                if isinstance(past, int)
                else skeleton.record_calls_after(ids, positions, past)
            )
            return ids

        with torch.no_grad(), headless(skeleton):
            functional(self._outer, skeleton.model, run)
        return calls

    def _through(self, layer: int, call: LayerCall) -> tuple[Tensor, Tensor]:
        module = self._skeleton.layers[layer]
        own = {name: _noise(p.shape, seed) for seed, (name, p) in enumerate(module.named_parameters())}
        kwargs = fill(call.kwargs, call.tensors)
        with torch.no_grad():
            result = functional(own, module, lambda: self._skeleton.call_layer(module, call.hidden_states, kwargs))
        return call.hidden_states, result


def _agree(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    return all(
        torch.allclose(one, other, rtol=1e-3, atol=1e-4 * max(1.0, float(one.abs().max())))
        for one, other in zip(expected, found, strict=True)
    )


def _noise(shape: Sequence[int], seed: int) -> Tensor:
    """Weights of a size that leaves attention some choice: scores near 1."""
    return cheap_noise(shape, seed, min(shape) ** -0.5 if len(shape) > 1 else 1.0)
