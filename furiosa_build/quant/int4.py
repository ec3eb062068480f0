"""int4: weights as whole numbers of 4 bits, with a scale and perhaps a zero point for each group of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.config_group import ConfigGroup, rounded_activations
from furiosa_build.quant.int8 import round_to_int8
from furiosa_build.quant.scheme import QuantScheme
from furiosa_build.quant.slices import one_thread, row_slices

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUP_SIZES = (32, 64, 128)
ZERO = 8
"""compressed-tensors packs numbers as unsigned: value + 8."""
_LOWEST, _HIGHEST = -8, 7
_NUMBERS_OF_INT32 = 8
_STEPS_TO_THE_LARGEST = (7.0, 7.5, 8.0, 9.0, 10.0)
"""How many steps of a scale reach the largest magnitude of a group, for the scales that are tried; what is beyond 8
is clamped. Twenty more of them lower the root of the mean squared error by less than 1 %."""


@dataclass(frozen=True)
class Int4(QuantScheme):
    """Parts: `weight_packed`, numbers packed by eight into int32 [out, in / 8], `weight_shape` (int64 [2]) and
    `weight_scale` [out, groups]; where `asymmetric`, `weight_zero_point`, packed by rows into int32 [out / 8, groups].

    Attributes:
        group_size: Columns that share a scale.
        asymmetric: Each group has a zero point.
        dynamic: The layer rounds its input to int8.
    """

    group_size: int = 128
    asymmetric: bool = False
    dynamic: bool = False
    family = "int4"
    words = (*map(str, GROUP_SIZES), "asymmetric", "dynamic")
    formats = ("pack-quantized",)
    scales = ("weight_scale",)

    @classmethod
    def of_words(cls, words: Sequence[str]) -> Self:
        sizes = [int(word) for word in words if word.isdecimal()]
        return cls(sizes[-1] if sizes else 128, "asymmetric" in words, "dynamic" in words)

    @property
    def text(self) -> str:
        size = [] if self.group_size == 128 else [str(self.group_size)]
        flags = [word for word in ("asymmetric", "dynamic") if getattr(self, word)]
        return "-".join([self.family, *size, *flags])

    @property
    def described(self) -> str:
        zero = "a scale and a zero point" if self.asymmetric else "a scale"
        rounded = "activations rounded to int8 per token" if self.dynamic else "activations as they are"
        return f"int4 weights with {zero} per group of {self.group_size}, {rounded}"

    @property
    def rounds_activations(self) -> bool:
        return self.dynamic

    def parts(self, weight: Layout) -> dict[str, Layout]:
        rows, columns = weight.shape
        groups = columns // self.group_size
        found = {
            "weight_packed": Layout("int32", (rows, columns // _NUMBERS_OF_INT32)),
            "weight_shape": Layout("int64", (2,)),
            "weight_scale": Layout(weight.dtype, (rows, groups)),
        }
        if self.asymmetric:
            found["weight_zero_point"] = Layout("int32", (rows // _NUMBERS_OF_INT32, groups))
        return found

    def operands(self, weight: Layout) -> dict[str, Layout]:
        parts = self.parts(weight)
        del parts["weight_shape"]
        return {name: _as_bytes(layout) if layout.dtype == "int32" else layout for name, layout in parts.items()}

    def refusal(self, weight: Layout) -> str:
        rows, columns = weight.shape
        if columns % self.group_size:
            return f"{columns} columns are not whole groups of {self.group_size}"
        if self.asymmetric and rows % _NUMBERS_OF_INT32:
            return f"the zero points of {rows} rows are not whole int32, of {_NUMBERS_OF_INT32} each"
        return ""

    def derived(self, part: str, weight: Layout) -> Tensor | None:
        import torch

        return torch.tensor(weight.shape) if part == "weight_shape" else None

    # Numbers

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        """Scales, and with them zero points, are those of a few for each group that make the squared error least."""
        import torch

        rows, columns = weight.shape
        groups = columns // self.group_size
        scales = torch.empty((rows, groups), dtype=weight.dtype)
        packed = torch.empty((rows, columns // 2), dtype=torch.uint8)
        zeros = torch.zeros((rows, groups), dtype=torch.uint8)
        with one_thread():
            for part in row_slices(rows, columns):
                values = weight[part].float().reshape(-1, groups, self.group_size)
                scale, zero = self._search(values)
                # The scale is rounded to the model's dtype first: what is stored is what the weight is divided by.
                scales[part] = scale.clamp_min(torch.finfo(weight.dtype).tiny).squeeze(-1)
                scale = scales[part].float().unsqueeze(-1)
                numbers = (values / scale).add_(zero).round_().clamp_(_LOWEST, _HIGHEST).add_(ZERO)
                packed[part] = _pack(numbers.to(torch.uint8).reshape(-1, columns))
                zeros[part] = zero.add(ZERO).to(torch.uint8).squeeze(-1)
        found = {
            "weight_packed": packed.view(torch.int32),
            "weight_shape": torch.tensor([rows, columns]),
            "weight_scale": scales,
        }
        if self.asymmetric:
            words = _pack(zeros.T.contiguous()).flatten().view(torch.int32)
            found["weight_zero_point"] = words.reshape(groups, -1).T.clone(memory_format=torch.contiguous_format)
        return found

    def _search(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point [rows, groups, 1] of values [rows, groups, group_size]: float32, the latter whole.

        For the numbers that a scale gives, another one makes the error least: sum(value * number) / sum(number^2). What
        it takes from the squared error is sum(value * number)^2 / sum(number^2).
        """
        import torch

        low, high = (extreme(dim=-1, keepdim=True) for extreme in (values.amin, values.amax))
        low, high = (low.clamp(max=0), high.clamp(min=0)) if self.asymmetric else (low, torch.maximum(high, -low))
        best = torch.full_like(high, -1.0)
        scale, zero = torch.ones_like(high), torch.zeros_like(high)
        for steps in _STEPS_TO_THE_LARGEST:
            tried = (high - low) / (2 * steps) if self.asymmetric else high / steps
            tried = torch.where(tried > 0, tried, 1.0)
            of_zero = (_LOWEST - low / tried).round_().clamp_(_LOWEST, _HIGHEST) if self.asymmetric else zero
            if self.asymmetric and steps > -_LOWEST:  # what is clamped is so on both sides
                of_zero = (-0.5 - (low + high) / (2 * tried)).round_().clamp_(_LOWEST, _HIGHEST)
            numbers = values / tried
            if self.asymmetric:
                numbers.add_(of_zero).round_().clamp_(_LOWEST, _HIGHEST).sub_(of_zero)
            else:
                numbers.round_().clamp_(_LOWEST, _HIGHEST)
            products = (values * numbers).sum(-1, keepdim=True)
            squares = numbers.square_().sum(-1, keepdim=True)
            gain = torch.where(squares > 0, products * products / squares, 0.0)
            better = gain > best
            best = torch.where(better, gain, best)
            scale = torch.where(better & (squares > 0), products / squares, scale)
            zero = torch.where(better, of_zero, zero)
        return scale, zero

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        import torch

        zeros = stored["weight_zero_point"].view(torch.uint8) if self.asymmetric else None
        with one_thread():
            return self._weight(stored["weight_packed"].view(torch.uint8), stored["weight_scale"].to(dtype), zeros)

    def product(self, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        from torch.nn import functional

        packed, scales, *zeros = operands
        return functional.linear(x, self._weight(packed, scales.to(x.dtype), zeros[0] if zeros else None))

    def _weight(self, packed: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """The weight [out, in] of the dtype of its scales, from its parts as bytes."""
        import torch

        rows, columns = packed.shape[0], 2 * packed.shape[1]
        offsets = torch.full_like(scales, ZERO) if zeros is None else _by_rows(zeros).to(scales.dtype)
        result = torch.empty((rows, columns), dtype=scales.dtype)
        for part in row_slices(rows, columns):
            numbers = _unpack(packed[part]).to(scales.dtype).reshape(-1, scales.shape[1], self.group_size)
            numbers.sub_(offsets[part].unsqueeze(-1)).mul_(scales[part].unsqueeze(-1))  # the difference is exact
            result[part] = numbers.reshape(-1, columns)
        return result

    def round(self, x: Tensor, largest: Tensor) -> Tensor:
        return round_to_int8(x, largest)

    # The checkpoint's configuration

    @classmethod
    def claims(cls, group: ConfigGroup) -> bool:
        return bool(group.num_bits == 4)

    @classmethod
    def read(cls, group: ConfigGroup) -> Self:
        weights = group.mapping("weights")
        group.only("weights.num_bits", group.num_bits, 4)
        group.only("weights.type", weights.get("type", "int"), "int")
        group.only("weights.strategy", weights.get("strategy"), "group")
        group.only("weights.group_size", weights.get("group_size"), *GROUP_SIZES)
        group.only("weights.symmetric", weights.get("symmetric", True), True, False)
        group.only("weights.dynamic", weights.get("dynamic", False), False)
        group.only("weights.actorder", weights.get("actorder"), None, "static", "weight")  # of these no weight tells
        group.only("output_activations", group.get("output_activations"), None)
        return cls(weights["group_size"], not weights.get("symmetric", True), group.rounds_activations("int"))

    def config_group(self) -> dict[str, Any]:
        return {
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": not self.asymmetric,
                "strategy": "group",
                "group_size": self.group_size,
                "dynamic": False,
            },
            "input_activations": rounded_activations("int") if self.dynamic else None,
            "output_activations": None,
            "format": "pack-quantized",
        }


def _as_bytes(layout: Layout) -> Layout:
    rows, columns = layout.shape
    return Layout("uint8", (rows, 4 * columns))


def _pack(numbers: Tensor) -> Tensor:
    """Numbers of 0 to 15 [rows, n] as bytes [rows, n / 2], the first in the low bits."""
    return numbers[:, 1::2].bitwise_left_shift(4).bitwise_or_(numbers[:, ::2])


def _unpack(packed: Tensor) -> Tensor:
    """The numbers of bytes [rows, n], in order: [rows, 2 * n]."""
    import torch

    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def _by_rows(zeros: Tensor) -> Tensor:
    """The zero points [out, groups], each from 0 to 15, of `weight_zero_point` as bytes [out / 8, 4 * groups]."""
    words, width = zeros.shape
    return _unpack(zeros).reshape(words, width // 4, _NUMBERS_OF_INT32).transpose(1, 2).flatten(0, 1)
