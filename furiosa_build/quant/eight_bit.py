"""What fp8 and int8 have in common: symmetric 8-bit weights with a scale for each output channel, or one for all.

The layer computes `y = (x @ numbers.T) * scale`, with x rounded to the same numbers first where the scheme says so.
Names and bytes are those of compressed-tensors checkpoints.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.config_group import ConfigGroup, rounded_activations
from furiosa_build.quant.scheme import QuantScheme
from furiosa_build.quant.slices import one_thread, row_slices

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class EightBit(QuantScheme):
    """A scheme of 8-bit numbers.

    Attributes:
        tensor: One scale for the whole weight; else one for each output channel.
        dynamic: The layer rounds its input to the same numbers.
        kind: What compressed-tensors calls the numbers: `float` or `int`.
        limit: The largest number that a weight is stored as.
    """

    tensor: bool = False
    dynamic: bool = False
    scales = ("weight_scale",)
    kind: ClassVar[str]
    limit: ClassVar[float]

    @property
    def rounds_activations(self) -> bool:
        return self.dynamic

    @property
    def described(self) -> str:
        scales = "one scale" if self.tensor else "a scale per channel"
        rounded = f"activations rounded to {self.family} per token" if self.dynamic else "activations as they are"
        return f"{self.family} weights with {scales}, {rounded}"

    def scale_layout(self, weight: Layout) -> Layout:
        """The layout of `weight_scale`."""
        return Layout(weight.dtype, (1,) if self.tensor else (weight.shape[0], 1))

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        import torch

        if self not in (type(self)(), type(self)(dynamic=True)):
            raise ValueError(f"{self.text} weights are taken from checkpoints, not made")
        rows, columns = weight.shape
        scale = torch.empty((rows, 1), dtype=weight.dtype)
        stored = self.empty(rows, columns)
        with one_thread():
            for part in row_slices(rows, columns):
                values = weight[part].float()
                largest = values.abs().amax(dim=1, keepdim=True)
                own = torch.where(largest > 0, largest / self.limit, 1.0).clamp_min(torch.finfo(scale.dtype).tiny)
                # The scale is rounded to the model's dtype first: what is stored is what the weight is divided by.
                scale[part] = own
                self.put(stored[part], (values / scale[part].float()).clamp_(-self.limit, self.limit))
        return self.named(stored, scale, columns)

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        import torch

        weight = self.unpacked(stored)
        scale = stored["weight_scale"].to(dtype).reshape(-1, 1).expand(len(weight), 1)
        result = torch.empty(weight.shape, dtype=dtype)
        with one_thread():
            for part in row_slices(*weight.shape):
                result[part] = self.to_float(weight[part]) * scale[part].float()
        return result

    def product(self, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        from torch.nn import functional

        weight, scale = operands
        numbers = self.to_float(weight[:, : x.shape[-1]])
        return functional.linear(x, numbers.to(x.dtype)) * scale.reshape(-1)

    def rows(self, ids: Tensor, operands: Sequence[Tensor], columns: int) -> Tensor:
        from torch.nn import functional

        weight, scale = operands
        numbers = functional.embedding(ids, weight)
        numbers = numbers if numbers.shape[-1] == columns else numbers[..., :columns]
        return (self.to_float(numbers) * functional.embedding(ids, scale).float()).to(scale.dtype)

    @abstractmethod
    def empty(self, rows: int, columns: int) -> Tensor:
        """Memory for the numbers of a weight, for `put` to fill."""

    @abstractmethod
    def put(self, stored: Tensor, values: Tensor) -> None:
        """Rounds float32 values to nearest, ties to even, into rows of `stored`."""

    @abstractmethod
    def named(self, stored: Tensor, scale: Tensor, columns: int) -> dict[str, Tensor]:
        """The parts of a weight, from its numbers and scales."""

    @abstractmethod
    def unpacked(self, stored: Mapping[str, Tensor]) -> Tensor:
        """A weight's numbers [out, in], one element each."""

    @abstractmethod
    def to_float(self, numbers: Tensor) -> Tensor:
        """Stored numbers as float32, before scaling: exact."""

    @classmethod
    def claims(cls, group: ConfigGroup) -> bool:
        return bool(group.num_bits == 8)

    @classmethod
    def read(cls, group: ConfigGroup) -> Self:
        weights = group.mapping("weights")
        group.only("weights.num_bits", weights.get("num_bits", 8), 8)
        group.only("weights.type", weights.get("type", "int"), cls.kind)
        group.only("weights.strategy", weights.get("strategy"), "channel", "tensor")
        group.only("weights.group_size", weights.get("group_size"), None, -1)
        group.only("weights.symmetric", weights.get("symmetric", True), True)
        group.only("weights.dynamic", weights.get("dynamic", False), False)
        group.only("output_activations", group.get("output_activations"), None)
        return cls(tensor=weights["strategy"] == "tensor", dynamic=group.rounds_activations(cls.kind))

    def config_group(self) -> dict[str, Any]:
        numbers = {"num_bits": 8, "type": self.kind, "symmetric": True}
        return {
            "weights": {**numbers, "strategy": "tensor" if self.tensor else "channel", "dynamic": False},
            "input_activations": rounded_activations(self.kind) if self.dynamic else None,
            "output_activations": None,
            "format": self.formats[0],
        }
