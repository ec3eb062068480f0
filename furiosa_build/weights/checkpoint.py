"""Where weights come from: safetensors files, mapped, or numbers drawn from a seed. One tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping

from furiosa_build.core.errors import UserError
from furiosa_build.ir.dtypes import FLOATS
from furiosa_build.ir.outline import Outline, ParameterOutline
from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.quantization import stored_layouts
from furiosa_build.weights.source import TensorSource


def check_stored(source: TensorSource, outline: Outline, schemes: Mapping[str, str], where: str) -> None:
    """Raises UserError unless `source` has every parameter in the form that `schemes` says, and no more.

    It may have more layers. A scale may have any floating dtype, and any shape with as many numbers.
    """
    expected = {
        stored: (layout, scheme)
        for name, parameter in outline.parameters.items()
        for scheme in [schemes.get(name, "none")]
        for stored, layout in stored_layouts(name, parameter.layout, scheme).items()
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
    for name, (layout, scheme) in expected.items():
        _check_tensor(name, source.layout(name), layout, scheme, where)
        if name.endswith(".weight_shape"):
            whole = outline.parameters[name.removesuffix("_shape")].shape
            if source.read(name).tolist() != whole:
                raise _wrong(name, f"says {source.read(name).tolist()}", where, str(whole))


def _check_tensor(name: str, found: Layout, expected: Layout, scheme: str, where: str) -> None:
    if name.endswith(".weight_scale"):
        fits = math.prod(found.shape) == math.prod(expected.shape)
    else:
        fits = found.shape == expected.shape
    dtypes = FLOATS if scheme == "none" or name.endswith(".weight_scale") else (expected.dtype,)
    if found.dtype not in dtypes:
        raise _wrong(name, f"has dtype {found.dtype}", where, " or ".join(dtypes))
    if not fits:
        raise _wrong(name, f"has shape {list(found.shape)}", where, str(list(expected.shape)))


def _wrong(name: str, what: str, where: str, valid: str) -> UserError:
    return UserError(f"{name} of the quantized checkpoint {what}", where=where, valid=valid)


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


def check_parameters(source: TensorSource, parameters: Mapping[str, ParameterOutline], where: str) -> None:
    """Raises UserError unless `source` has every parameter, in its shape."""
    missing = sorted(set(parameters) - source.names())
    if missing:
        raise UserError(
            f"the weights lack {len(missing)} of {len(parameters)} parameters: {', '.join(missing[:3])}"
            + (", ..." if len(missing) > 3 else ""),
            where=where,
            hint="the weights and the architecture (config.json) do not belong together",
        )
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
