"""Where weights come from: safetensors files, mapped, or numbers drawn from a seed. One tensor at a time."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from furiosa_build.checkpoint import weight_files
from furiosa_build.errors import UserError
from furiosa_build.models.quantization import stored_layouts
from furiosa_build.models.safetensors_file import Layout
from furiosa_build.plan.outline import Outline, ParameterOutline

_DRAW = 1 << 22
"""Random numbers drawn at a time, so that memory stays bounded."""


_UNQUANTIZED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TensorSource(Protocol):
    """Named tensors, each read when it is asked for."""

    def names(self) -> set[str]:
        """All there are."""
        ...

    def layout(self, name: str) -> Layout:
        """A tensor's dtype and shape, without reading it."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor. A mapped one costs no memory until it is used."""
        ...


class SafetensorsSource:
    """The tensors of several safetensors files. Raises UserError for a file that is not one."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{file.name} is not a sound safetensors file: {error}",
                    where=str(file),
                    hint="the download or copy may be cut short; fetch it again",
                ) from error
            for name in opened.offset_keys():
                if name in self._files:
                    raise UserError(f"tensor {name} stands in two files", where=str(file))
                self._files[name] = opened

    def names(self) -> set[str]:
        return set(self._files)

    def layout(self, name: str) -> Layout:
        mapped = self.read(name)
        return Layout(mapped.dtype, tuple(mapped.shape))

    def read(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)  # type: ignore[no-any-return]


class RandomSource:
    """Weights drawn from `seed`: a tensor depends on the seed and its own name and shape alone.

    Vectors called weight (norms) are near one, all else is normal with variance 1 / fan-in.
    """

    def __init__(self, parameters: Mapping[str, ParameterOutline], seed: int) -> None:
        self._parameters, self._seed = parameters, seed

    def names(self) -> set[str]:
        return set(self._parameters)

    def layout(self, name: str) -> Layout:
        return layout_of(self._parameters[name])

    def read(self, name: str) -> Tensor:
        outline = self._parameters[name]
        key = hashlib.sha256(f"{self._seed} {name} {outline.shape}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
        tensor = torch.empty(outline.shape, dtype=getattr(torch, outline.dtype))
        is_vector = len(outline.shape) == 1
        scale = 0.02 if is_vector else outline.shape[-1] ** -0.5
        offset = 1.0 if is_vector and name.endswith("weight") else 0.0
        flat = tensor.view(-1)
        for begin in range(0, math.prod(outline.shape), _DRAW):
            part = flat[begin : begin + _DRAW]
            part.copy_(torch.from_numpy(generator.standard_normal(part.numel(), dtype=np.float32) * scale + offset))
        return tensor


def open_checkpoint(path: Path) -> SafetensorsSource:
    """The weights of a directory in Hugging Face layout, or of one file."""
    return SafetensorsSource([path / name for name in weight_files(path)] if path.is_dir() else [path])


def layout_of(parameter: ParameterOutline) -> Layout:
    """dtype and shape of a parameter before it is quantized."""
    return Layout(getattr(torch, parameter.dtype), tuple(parameter.shape))


def check_stored(source: TensorSource, outline: Outline, schemes: Mapping[str, str], where: str) -> None:
    """Raises UserError unless `source` has every parameter in the form that `schemes` says, and no more.

    It may have more layers. A scale may have any floating dtype, and any shape with as many numbers.
    """
    expected = {
        stored: (layout, scheme)
        for name, parameter in outline.parameters.items()
        for scheme in [schemes.get(name, "none")]
        for stored, layout in stored_layouts(name, layout_of(parameter), scheme).items()
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
    dtypes = _UNQUANTIZED if scheme == "none" or name.endswith(".weight_scale") else (expected.dtype,)
    if found.dtype not in dtypes:
        raise _wrong(name, f"has dtype {found.dtype}", where, " or ".join(map(str, dtypes)))
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
        if layout.dtype not in _UNQUANTIZED:
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
