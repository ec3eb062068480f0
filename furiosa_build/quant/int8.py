"""int8: weights as whole numbers of 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from furiosa_build.ir.sharding import Share
from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.config_group import ConfigGroup
from furiosa_build.quant.eight_bit import EightBit

if TYPE_CHECKING:
    from torch import Tensor

ZERO = 128
"""compressed-tensors packs numbers as unsigned: value + 128."""


@dataclass(frozen=True)
class Int8(EightBit):
    """Parts: `weight_packed`, numbers packed by four into int32 [out, in / 4 rounded up], `weight_shape` (int64 [2])
    and `weight_scale`; where `plain`, `weight` (int8 [out, in]) and `weight_scale`.
    """

    plain: bool = False
    family = "int8"
    words = ("plain", "tensor", "dynamic")
    formats = ("pack-quantized", "int-quantized")
    kind = "int"
    limit = 127.0

    def parts(self, weight: Layout) -> dict[str, Layout]:
        scale, (rows, columns) = self.scale_layout(weight), weight.shape
        if self.plain:
            return {"weight": Layout("int8", weight.shape), "weight_scale": scale}
        packed = Layout("int32", (rows, packed_columns(columns) // 4))
        return {"weight_packed": packed, "weight_shape": Layout("int64", (2,)), "weight_scale": scale}

    def operands(self, weight: Layout) -> dict[str, Layout]:
        if self.plain:
            return self.parts(weight)
        rows, columns = weight.shape
        packed = Layout("uint8", (rows, packed_columns(columns)))
        return {"weight_packed": packed, "weight_scale": self.scale_layout(weight)}

    def derived(self, part: str, weight: Layout) -> Tensor | None:
        import torch

        return torch.tensor(weight.shape) if part == "weight_shape" else None

    def shard(self, part: str, stored: Tensor, share: Share) -> Tensor:
        if part == "weight_packed" and share.dim == 1:
            return _repack(stored, share.begin, share.local.shape[1])
        return super().shard(part, stored, share)

    def empty(self, rows: int, columns: int) -> Tensor:
        import torch

        return torch.empty((rows, packed_columns(columns)), dtype=torch.uint8)

    def put(self, stored: Tensor, values: Tensor) -> None:
        import torch

        stored.fill_(ZERO)
        stored[:, : values.shape[1]] = (values.round_() + ZERO).to(torch.uint8)

    def named(self, stored: Tensor, scale: Tensor, columns: int) -> dict[str, Tensor]:
        import torch

        shape = torch.tensor([len(stored), columns])
        return {"weight_packed": stored.view(torch.int32), "weight_shape": shape, "weight_scale": scale}

    def unpacked(self, stored: Mapping[str, Tensor]) -> Tensor:
        import torch

        if self.plain:
            return stored["weight"]
        return stored["weight_packed"].view(torch.uint8)[:, : int(stored["weight_shape"][1])]

    def to_float(self, numbers: Tensor) -> Tensor:
        return numbers.float() if self.plain else numbers.float() - ZERO

    def round(self, x: Tensor, largest: Tensor) -> Tensor:
        return round_to_int8(x, largest)

    @classmethod
    def read(cls, group: ConfigGroup) -> Self:
        found = super().read(group)
        return cls(tensor=found.tensor, dynamic=found.dynamic, plain=group.format == "int-quantized")

    def config_group(self) -> dict[str, Any]:
        return {**super().config_group(), "format": "int-quantized" if self.plain else "pack-quantized"}


def round_to_int8(x: Tensor, largest: Tensor) -> Tensor:
    """`QuantScheme.round` as compressed-tensors does it: the largest number is 255 / 2 steps, not 127, and clamped."""
    import torch

    scale = largest / 127.5
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    return (x / scale).clamp(-128, 127).round() * scale


def packed_columns(columns: int) -> int:
    """Numbers in a packed row: rows are padded to whole int32."""
    return -(-columns // 4) * 4


def _repack(packed: Tensor, begin: int, length: int) -> Tensor:
    """Columns of a packed matrix, as a matrix of their own."""
    import torch

    own = torch.zeros((packed.shape[0], packed_columns(length)), dtype=torch.uint8)
    own[:, :length] = packed.view(torch.uint8)[:, begin : begin + length]
    return own.view(torch.int32)
