"""Rotary tables that depend on how long a sequence is: LongRoPE, dynamic NTK.

transformers computes them anew for each batch, from its longest sequence, so that what one sequence gets depends on its
neighbours, and on what came before. Up to a length they are constant, and there they are supported: a program has the
tables of short sequences, and a build that is for longer ones is refused.
"""

from __future__ import annotations

from torch import nn

from furiosa_build.ir.outline import RotaryLimit

_LONGROPE, _DYNAMIC = "longrope", "dynamic"


def hold_rotary_tables(model: nn.Module) -> RotaryLimit | None:
    """Makes the rotary tables of a model those of short sequences; returns up to which length that is right."""
    limits = []
    for module in model.modules():
        types = getattr(module, "rope_type", None)
        if isinstance(types, str):
            limit = _limit(module, types, None)
            module.rope_type = types if limit is None else "default"  # type: ignore[assignment]
            limits.append(limit)
        elif isinstance(types, dict):  # by type of layer
            own = {layer_type: _limit(module, rope, layer_type) for layer_type, rope in types.items()}
            module.rope_type = {  # type: ignore[assignment]
                layer_type: rope if own[layer_type] is None else "default" for layer_type, rope in types.items()
            }
            limits += own.values()
    return min((limit for limit in limits if limit is not None), key=lambda limit: limit.longest, default=None)


def _limit(module: nn.Module, rope_type: str, layer_type: str | None) -> RotaryLimit | None:
    if rope_type == _LONGROPE:
        parameters = module.config.rope_parameters  # type: ignore[union-attr]
        own = parameters if layer_type is None else parameters[layer_type]  # type: ignore[index]
        return RotaryLimit(rope_type=rope_type, longest=own["original_max_position_embeddings"])  # type: ignore[index]
    if _DYNAMIC in rope_type:
        return RotaryLimit(rope_type=rope_type, longest=module.original_max_seq_len)
    return None
