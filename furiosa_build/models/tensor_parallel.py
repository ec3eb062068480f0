"""A model as one rank of a tensor-parallel group has it: parameters of a rank's size, and collectives between them.

Which modules are cut, and how, is the model's own plan (`tp_plan` of transformers). All ranks trace to the same graph.
Megatron-LM (https://arxiv.org/abs/1909.08053) explains why one all-reduce after attention and one after the MLP do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from furiosa_build.backends.ops import all_gather, all_reduce
from furiosa_build.ir.sharding import Cut
from furiosa_build.models.skeleton import Skeleton
from furiosa_build.quant.linear import QuantizedEmbedding, QuantizedLinear

_WHOLE = {"replicated_with_grad_allreduce"}
_KV = ("k_proj", "v_proj")


def module_styles(skeleton: Skeleton) -> dict[str, str]:
    """Module -> its style, such as `colwise`, by the model's plan. Modules that every rank has whole are left out."""
    plan: Mapping[str, str] = getattr(skeleton.model, "tp_plan", None) or {}
    patterns = [(re.compile(re.escape(key).replace(r"\*", r"\d+")), style) for key, style in plan.items()]
    found = {}
    for name, _ in skeleton.model.named_modules():
        style = next((style for pattern, style in patterns if pattern.fullmatch(name)), None)
        if style is not None and style not in _WHOLE:
            found[name] = style
    return found


def parameter_cuts(skeleton: Skeleton) -> dict[str, Cut]:
    """How each parameter that is cut is cut. Empty when the model has no plan, or one of which something is unknown."""
    cuts: dict[str, Cut] = {}
    for name, style in module_styles(skeleton).items():
        module, inner = skeleton.model.get_submodule(name), name.startswith(skeleton.layer_prefix(0)[:-2])
        heads = Cut(how="heads", heads=skeleton.kv_heads)
        match style:
            case "colwise" if isinstance(module, nn.Linear):
                rows = heads if name.endswith(_KV) else Cut(how="rows")
                own = {"weight": rows, "bias": rows}
            case "rowwise" if isinstance(module, nn.Linear):
                own = {"weight": Cut(how="columns"), "bias": Cut(how="once")}
            case "embedding_rowwise" | "colwise_gather_output" if not inner:
                own = {"weight": Cut(how="vocabulary"), "bias": Cut(how="vocabulary")}
            case _:
                return {}
        cuts.update({f"{name}.{leaf}": own[leaf] for leaf, _ in module.named_parameters(recurse=False)})
    return {name: cuts[name] for name, _ in skeleton.model.named_parameters() if name in cuts}


class Rank:
    """Makes a skeleton's model that of one rank among `size`, in place.

    Args:
        skeleton: Whose linear layers are still those of transformers.
        cuts: Full parameter name -> how it is cut.
        size: Ranks of the group.
    """

    def __init__(self, skeleton: Skeleton, cuts: Mapping[str, Cut], size: int) -> None:
        self._skeleton, self._size = skeleton, size
        self._rank: Tensor | None = None
        made: dict[int, nn.Parameter] = {}
        by_parameter = {id(p): cuts[name] for name, p in skeleton.model.named_parameters() if name in cuts}
        for name, parameter in list(skeleton.model.named_parameters(remove_duplicate=False)):
            if id(parameter) in by_parameter:
                if id(parameter) not in made:
                    shape = by_parameter[id(parameter)].local_shape(list(parameter.shape), size)
                    empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=False)
                owner, _, leaf = name.rpartition(".")
                setattr(skeleton.model.get_submodule(owner), leaf, made[id(parameter)])

    def join(self) -> None:
        """Puts the collectives into the modules. To be called when the linear layers are the final ones."""
        for name, style in module_styles(self._skeleton).items():
            module = self._skeleton.model.get_submodule(name)
            if style == "rowwise":
                module.register_forward_hook(_reduce)
                if isinstance(module, QuantizedLinear):
                    module.largest_of_all = self._largest
            elif _rows(module) != self._skeleton.vocab_size:
                if style == "colwise_gather_output":
                    module.register_forward_hook(self._gather)
                elif style == "embedding_rowwise":
                    assert isinstance(module, nn.Embedding | QuantizedEmbedding)
                    if isinstance(module, nn.Embedding):
                        module.padding_idx = None
                    module.forward = self._embedding(module.forward, _rows(module))  # type: ignore[assignment,method-assign]

    @contextmanager
    def known(self, rank: Tensor | None) -> Iterator[None]:
        """Within, `rank` (int64 [1]) is the number of this rank."""
        self._rank = rank
        try:
            yield
        finally:
            self._rank = None

    def _largest(self, own: Tensor) -> Tensor:
        gathered: Tensor = all_gather(own.contiguous(), self._size)
        return gathered.amax(-1, keepdim=True)

    def _gather(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        del module, inputs
        joined: Tensor = all_gather(output.contiguous(), self._size)
        return joined

    def _embedding(self, embed: Callable[[Tensor], Tensor], rows: int) -> Callable[[Tensor], Tensor]:
        """An embedding of a rank's rows: zeros for tokens of other ranks' rows, which the sum over ranks replaces."""

        def forward(ids: Tensor) -> Tensor:
            if self._rank is None:  # only the shape is asked for
                return embed(ids)
            own = ids - self._rank * rows
            inside = (own >= 0) & (own < rows)
            embedded = embed(own.clamp(0, rows - 1))
            joined: Tensor = all_reduce(torch.where(inside.unsqueeze(-1), embedded, torch.zeros_like(embedded)))
            return joined

        return forward


def _reduce(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    del module, inputs
    joined: Tensor = all_reduce(output.contiguous())
    return joined


def _rows(module: nn.Module) -> int:
    weight = next(iter(module.parameters()))
    return int(weight.shape[0])
