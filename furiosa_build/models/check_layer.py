"""Looks at how one decoder layer attends, by running transformers' own code of it.

The layer runs twice over: its own operations on fake tensors, since its weights may be large, and its attention on real
numbers, by transformers' eager function and by the operator that takes its place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from transformers import Cache
from transformers.masking_utils import eager_mask

from furiosa_build.backends.ops import paged_attention_reference
from furiosa_build.models.attention import AttentionCall, MaskFunction, attending
from furiosa_build.models.refusals import refusal
from furiosa_build.models.skeleton import LayerCall, fill, functional, structure


class MadeMasks:
    """The masks that transformers has made for a model, and the functions of indices that they were made from."""

    def __init__(self) -> None:
        self._made: list[tuple[Tensor, MaskFunction]] = []

    def make(self, *, mask_function: MaskFunction, **kwargs: Any) -> Tensor:
        """A mask, by the arguments of `sdpa_mask`: what eager attention adds to its scores."""
        kwargs |= {"dtype": torch.float32, "device": "cpu", "allow_is_bidirectional_skip": False}
        mask: Tensor = eager_mask(mask_function=mask_function, **kwargs)
        self._made.append((mask, mask_function))
        return mask

    def number(self, mask: Tensor) -> int | None:
        """Which of them a tensor is."""
        return next((i for i, (made, _) in enumerate(self._made) if made is mask), None)

    def __getitem__(self, number: int) -> tuple[Tensor, MaskFunction]:
        """A mask, and what says which tokens attend to which others."""
        return self._made[number]


class LayerCheck:
    """A layer, as the model calls it for one sequence.

    Args:
        layer: The layer.
        number: Which one of the model's it is.
        call: How it is called, with real tensors.
        masks: The masks that have been made for the model.
    """

    def __init__(self, layer: nn.Module, number: int, call: LayerCall, masks: MadeMasks) -> None:
        self._layer, self._call, self._masks = layer, call, masks
        self._name = f"{type(layer).__name__} (layer {number})"
        self._real: dict[int, Tensor] = {}
        self._numbers: dict[int, int] = {}
        self._asked: list[AttentionCall] = []
        self._updates: list[tuple[Tensor, Tensor]] = []

    @property
    def likeness(self) -> str:
        """Equal for layers that need to be looked at only once."""
        masks = {name: self._masks.number(tensor) for name, tensor in self._call.tensors.items()}
        return f"{structure(self._layer)}{sorted(masks.items(), key=str)}"

    def run(self) -> None:
        """Raises UserError, with the reason, when the layer is not supported."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        caches = [leaf for leaf in tree_leaves(self._call.kwargs) if isinstance(leaf, Cache)]
        with torch.no_grad(), mode, attending(self._attend), self._watched(caches):
            tensors = {name: self._fake(mode, tensor) for name, tensor in self._call.tensors.items()}
            # In float32, as what the layer is called with: which dtypes go together is found by the trace.
            parameters = {name: torch.empty(p.shape) for name, p in self._layer.named_parameters()}
            states = mode.from_tensor(self._call.hidden_states)
            result = functional(
                parameters, self._layer, lambda: self._layer(states, **fill(self._call.kwargs, tensors))
            )
        if not self._asked:
            raise refusal(
                f"{self._name} does not attend through transformers' attention interface, so it cannot have a paged KV "
                "cache"
            )
        if len(self._asked) > 1:
            raise refusal(f"{self._name} attends {len(self._asked)} times, and a layer has one KV cache")
        if len(self._updates) != 1:
            raise refusal(f"{self._name} adds to its KV cache {len(self._updates)} times for a token, not once")
        if not isinstance(result, Tensor) or result.shape != states.shape:
            raise refusal(f"{self._name} returns something else than hidden states")

    def _fake(self, mode: FakeTensorMode, tensor: Tensor) -> Tensor:
        fake: Tensor = mode.from_tensor(tensor)
        self._real[id(fake)] = tensor
        number = self._masks.number(tensor)
        if number is not None:
            self._numbers[_storage(fake)] = number
        return fake

    @contextmanager
    def _watched(self, caches: list[Cache]) -> Iterator[None]:
        """What the layer does to its cache is kept; what is no cache of keys and values is refused."""

        def update(key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self._updates.append((key, value))
            return key, value

        def keeps_state(*_: Any, **__: Any) -> None:
            raise refusal(f"{self._name} keeps a state between tokens beside keys and values")

        layers = [layer for cache in caches for layer in cache.layers]
        before = [_tensors_of(layer) for layer in layers]
        for cache in caches:
            cache.update = update  # type: ignore[method-assign, assignment]
            for name in dir(Cache):
                if name.startswith("update_"):
                    setattr(cache, name, keeps_state)
        try:
            yield
            if [_tensors_of(layer) for layer in layers] != before:
                keeps_state()
        finally:
            for cache in caches:
                for name in [name for name in vars(cache) if name.startswith("update")]:
                    delattr(cache, name)

    def _attend(self, call: AttentionCall) -> Tensor:
        self._asked.append(call)
        lengths = {call.query.shape[2], call.key.shape[2], call.value.shape[2]}
        if len(lengths) != 1:
            raise refusal(f"{self._name} attends to something else than the keys and values of each token")
        mask = None
        if call.attention_mask is not None:
            number = self._numbers.get(_storage(call.attention_mask))
            mask, function = (None, None) if number is None else self._masks[number]
            if mask is None or function is None or call.attention_mask.shape != mask.shape:
                raise refusal(f"{self._name} gives its attention a mask or bias that it makes itself")
            with unset_fake_temporarily():
                _check_mask(self._name, function, call.sliding_window)
        self._compare(call, mask)
        return call.unattended

    def _compare(self, call: AttentionCall, mask: Tensor | None) -> None:
        """transformers' eager attention and the operator that takes its place, over the same numbers."""
        eager = getattr(sys.modules[type(call.module).__module__], "eager_attention_forward", None)
        if eager is None:
            raise refusal(f"{self._name} has no eager attention in transformers that could be compared with")
        with unset_fake_temporarily():
            generator = torch.Generator().manual_seed(0)

            def noise(tensor: Tensor) -> Tensor:
                return torch.randn(tuple(tensor.shape), generator=generator)

            own = {name: noise(p) for name, p in call.module.named_parameters(recurse=False)}
            for name, parameter in call.module.named_parameters(recurse=False):
                self._real[id(parameter)] = own[name]

            def real(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return value
                return self._real.setdefault(id(value), noise(value) if value.is_floating_point() else value)

            query, key, value = noise(call.query), noise(call.key), noise(call.value)
            arguments = {name: real(given) for name, given in call.keywords.items()}
            expected = functional(own, call.module, lambda: eager(call.module, query, key, value, mask, **arguments))[0]
            found = _by_operator(call, query, key, value, {n: real(v) for n, v in call.variant.items()})
            agree = expected.shape == found.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
        if not agree:
            raise refusal(f"{self._name} attends in a way of its own, which paged attention does not compute")


def _by_operator(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor, variant: dict[str, Any]) -> Tensor:
    tokens = key.shape[2]
    return paged_attention_reference(
        query=query,
        key=key,
        value=value,
        key_cache=torch.zeros(tokens, key.shape[1], key.shape[3]),
        value_cache=torch.zeros(tokens, value.shape[1], value.shape[3]),
        slot_mapping=torch.arange(tokens)[None],
        context_slots=None,
        context_lens=None,
        position_ids=None,
        scaling=call.scaling,
        sliding_window=call.sliding_window,
        **variant,
    )


def _check_mask(name: str, function: MaskFunction, window: int | None) -> None:
    """Refuses a mask that is not causal, or has another window than the attention is told of."""
    queries, keys = _index_pairs(window)
    zeros = torch.zeros_like(queries)
    try:
        visible = function(zeros, zeros, queries, keys).expand(queries.shape)
    except (IndexError, RuntimeError) as error:
        raise refusal(f"{name} has a mask that depends on the tokens") from error
    expected = keys <= queries
    if window is not None:
        expected &= keys > queries - window
    if not torch.equal(visible, expected):
        at = int((visible != expected).nonzero()[0])
        query, key, verb = int(queries[at]), int(keys[at]), "attends" if visible[at] else "does not attend"
        shown = "causal" if window is None else f"causal over {window} tokens"
        raise refusal(f"the mask of {name} is not {shown}: token {query} {verb} to token {key}")


def _index_pairs(window: int | None) -> tuple[Tensor, Tensor]:
    """Pairs of a query's and a key's index: all small ones, and such as tell a window, a chunk or a gap far away."""
    small = torch.arange(40)
    pairs = [torch.cartesian_prod(small, small)]
    generator = torch.Generator().manual_seed(0)
    sizes = [0 if window is None else window, 512, 1024, 4096]
    for query in (*(size + offset for size in sizes for offset in (-1, 0, 1, 63)), 10_000, 131_071, 2**20):
        near = torch.tensor([query + d - size for size in (0, *sizes) for d in (-1, 0, 1)])
        keys = torch.cat([near, torch.randint(0, max(query, 1) + 8, (64,), generator=generator)])
        pairs.append(torch.stack([torch.full_like(keys, query), keys], dim=1))
    found = torch.cat(pairs)
    found = found[(found >= 0).all(dim=1)]
    return found[:, 0], found[:, 1]


def _tensors_of(layer: object) -> list[int]:
    return [id(value) for value in vars(layer).values() if isinstance(value, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
