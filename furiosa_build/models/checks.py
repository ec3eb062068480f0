"""Checks that a model is one whose supertasks give what transformers gives: what the tracing takes for granted.

A token meets other tokens in attention only, once a layer, over the keys and values of all tokens up to it, and the
attention is one that `furiosa::paged_attention` computes. Nothing here knows an architecture: transformers' own code
runs, and what it does is looked at. `models.check_layer` looks at one layer, this module at the model around them.
Layers with attention of their own are run instead, by `models.check_own_attention`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from furiosa_build.models.attention import masks_made_by
from furiosa_build.models.check_layer import LayerCheck, MadeMasks
from furiosa_build.models.check_own_attention import check_own_attention
from furiosa_build.models.noise import cheap_noise, headless
from furiosa_build.models.refusals import refusal
from furiosa_build.models.skeleton import LayerCall, Recorder, Skeleton, functional

TOKENS = 11
"""Tokens of the sequence that models are looked at with: a number that no other dimension has."""


def check_model(skeleton: Skeleton) -> None:
    """Raises UserError, with the reason, when the model is not supported."""
    if any(DynamicCache(config=skeleton.config).is_linear):
        raise refusal(
            f"{type(skeleton.model).__name__} has layers that keep another state between tokens than keys and "
            "values: state-space layers, convolutions or linear attention"
        )
    ids = torch.arange(TOKENS)[None] * 7 % skeleton.vocab_size
    positions = torch.arange(TOKENS)[None]
    masks = MadeMasks()
    with masks_made_by(masks.make):
        calls = _chained_calls(skeleton, ids, positions)
    if skeleton.has_own_attention:
        check_own_attention(skeleton)
        return
    seen = set()
    for layer, call in enumerate(calls):
        check = LayerCheck(skeleton.layers[layer], layer, call, masks)
        if check.likeness not in seen:
            seen.add(check.likeness)
            check.run()
    _check_independence(skeleton, ids, positions)


def _chained_calls(skeleton: Skeleton, ids: Tensor, positions: Tensor) -> list[LayerCall]:
    """How the layers are called, each once, with what the one before it returns."""
    order: list[int] = []
    links = [_Link(layer, order, number) for number, layer in enumerate(skeleton.layers)]
    with skeleton.layers_replaced(links):
        _run(skeleton, input_ids=ids, position_ids=positions, use_cache=True)
    name = type(skeleton.model).__name__
    if order != list(range(len(links))):
        raise refusal(f"{name} does not run its layers one after the other, each once: {order[:12]}")
    for before, after in pairwise(links):
        if after.call.hidden_states is not before.returned:
            raise refusal(f"{name} changes what a layer returns before the next one takes it")
    return [link.call for link in links]


class _Link(Recorder):
    """A recorder that returns something new, so that it can be told whether the next one gets it."""

    returned: Tensor

    def __init__(self, layer: nn.Module, order: list[int], number: int) -> None:
        super().__init__(layer)
        self._order, self._number = order, number

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        super().forward(hidden_states, *args, **kwargs)
        self._order.append(self._number)
        self.returned = hidden_states.clone()
        return self.returned


def _check_independence(skeleton: Skeleton, ids: Tensor, positions: Tensor) -> None:
    """What layers are called with for a token depends on that token and its position, and on no other token."""
    whole = _calls(skeleton, ids, positions)
    far = skeleton.longest - 1
    for at in (0, TOKENS // 2, TOKENS - 1):
        pair = torch.tensor([[int(ids[0, at])], [1]])
        alone = _calls(skeleton, pair, torch.tensor([[int(positions[0, at])], [far]]))
        for layer, (all_tokens, one) in enumerate(zip(whole, alone, strict=True)):
            for name, tensor in {"hidden_states": all_tokens.hidden_states, **all_tokens.tensors}.items():
                other = one.hidden_states if name == "hidden_states" else one.tensors.get(name)
                if other is None or not _agree(tensor, other, at):
                    raise refusal(
                        f"{type(skeleton.model).__name__} calls layer {layer} with {name!r}, which for one token "
                        "depends on other tokens of the batch, or on what came before"
                    )


def _calls(skeleton: Skeleton, ids: Tensor, positions: Tensor) -> list[LayerCall]:
    recorders = [Recorder(layer) for layer in skeleton.layers]
    with skeleton.layers_replaced(recorders):
        _run(skeleton, input_ids=ids, position_ids=positions)
    return [recorder.call for recorder in recorders]


def _agree(whole: Tensor, alone: Tensor, at: int) -> bool:
    """Whether a tensor of [1, TOKENS] ids says the same of token `at` as that of [2, 1] does of its first row."""
    if whole.dim() != alone.dim():
        return False
    for dim, (many, few) in enumerate(zip(whole.shape, alone.shape, strict=True)):
        if many == TOKENS and few == 1:
            whole = whole.narrow(dim, at, 1)
        elif (many, few) == (1, 2):
            alone = alone.narrow(dim, 0, 1)
    if whole.shape != alone.shape or whole.dtype != alone.dtype:
        return False
    if whole.is_complex():
        whole, alone = torch.view_as_real(whole), torch.view_as_real(alone)
    return torch.allclose(whole.float(), alone.float(), rtol=1e-4, atol=1e-5, equal_nan=True)


def _run(skeleton: Skeleton, **inputs: Any) -> None:
    parameters = {
        name: cheap_noise(p.shape, seed) for seed, (name, p) in enumerate(skeleton.outer_parameters().items())
    }
    with torch.no_grad(), headless(skeleton):
        functional(parameters, skeleton.model, lambda: skeleton.run(**inputs))
