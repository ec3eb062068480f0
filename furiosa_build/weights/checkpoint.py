"""Checks that weights are those of the model: every parameter, in its shape, stored as its scheme stores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from furiosa_build.core.errors import UserError
from furiosa_build.ir.dtypes import FLOATS
from furiosa_build.ir.outline import Outline, ParameterOutline
from furiosa_build.quant.scheme import scheme
from furiosa_build.weights.source import TensorSource


def check_stored(source: TensorSource, outline: Outline, schemes: Mapping[str, str], where: str) -> None:
    """Raises UserError unless `source` has every parameter as its scheme stores it, and no more.

    It may have more layers.
    """
    expected = {
        own.stored_name(name, part): (own, part, parameter.layout)
        for name, parameter in outline.parameters.items()
        for own in [scheme(schemes.get(name, "none"))]
        for part in own.parts(parameter.layout)
    }
    names = source.names()
    if missing := sorted(expected.keys() - names):
        raise UserError(
            f"the quantized checkpoint lacks {_some(missing)}",
            where=where,
            hint="its config.json and its weights do not belong together: do targets and ignore name the right layers?",
        )
    if surplus := sorted(name for name in names - expected.keys() if not _is_of_no_use(name, outline)):
        raise UserError(
            f"the quantized checkpoint has {_some(surplus)}, which its config.json does not tell of",
            where=where,
            hint="is a layer quantized that config.json does not target, or by static scales or zero points?",
        )
    for name, (own, part, layout) in expected.items():
        mismatch = own.mismatch(part, layout, source.layout(name), partial(source.read, name))
        if mismatch is not None:
            what = f"{name} of the quantized checkpoint {mismatch.what}"
            raise UserError(what, where=where, valid=mismatch.valid)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names)} tensors)" if names[3:] else "")


def _is_of_no_use(name: str, outline: Outline) -> bool:
    """Whether a tensor may be there for nothing: of further layers, a table that is computed, a copy of a tied head."""
    inside, _, rest = name.removeprefix(outline.layer_prefix).partition(".")
    layers = sum(len(block.layers) for block in outline.blocks)
    is_of_later_layer = name.startswith(outline.layer_prefix) and rest != "" and inside.isdecimal()
    if is_of_later_layer and int(inside) >= layers:
        return True
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def lacking(missing: list[str], parameters: int, where: str, unknown: Sequence[str] = ()) -> UserError:
    """The error for weights without some of the model's so many parameters, but with tensors that are unknown to it."""
    others = f"; they have {unknown[0]}, which the model does not know" if unknown else ""
    return UserError(
        f"the weights lack {len(missing)} of {parameters} parameters: {', '.join(missing[:3])}"
        + (", ..." if len(missing) > 3 else ""),
        where=where,
        hint=f"the weights and the architecture (config.json) do not belong together{others}",
    )


def check_parameters(source: TensorSource, parameters: Mapping[str, ParameterOutline], where: str) -> None:
    """Raises UserError unless `source` has every parameter, in its shape."""
    if missing := sorted(set(parameters) - source.names()):
        raise lacking(missing, len(parameters), where)
    for name, outline in parameters.items():
        layout = source.layout(name)
        if layout.dtype not in FLOATS:
            raise UserError(
                f"parameter {name} has dtype {layout.dtype}: the weights are quantized already",
                where=where,
                valid="float64, float32, bfloat16 or float16",
            )
        shape = list(layout.shape)
        if shape != outline.shape:
            raise UserError(
                f"parameter {name} has shape {shape}, the architecture asks for {outline.shape}", where=where
            )
