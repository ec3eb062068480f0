"""fp8: weights as float8_e4m3fn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.eight_bit import EightBit

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Fp8(EightBit):
    """Parts: `weight` (float8_e4m3fn [out, in]) and `weight_scale`."""

    family = "fp8"
    words = ("tensor", "dynamic")
    formats = ("float-quantized",)
    kind = "float"
    limit = 448.0

    def parts(self, weight: Layout) -> dict[str, Layout]:
        return {"weight": Layout("float8_e4m3fn", weight.shape), "weight_scale": self.scale_layout(weight)}

    def empty(self, rows: int, columns: int) -> Tensor:
        import torch

        return torch.empty((rows, columns), dtype=torch.float8_e4m3fn)

    def put(self, stored: Tensor, values: Tensor) -> None:
        stored.copy_(values)

    def named(self, stored: Tensor, scale: Tensor, columns: int) -> dict[str, Tensor]:
        del columns
        return {"weight": stored, "weight_scale": scale}

    def unpacked(self, stored: Mapping[str, Tensor]) -> Tensor:
        return stored["weight"]

    def to_float(self, numbers: Tensor) -> Tensor:
        return numbers.float()

    def round(self, x: Tensor, largest: Tensor) -> Tensor:
        numbers, scale = self.steps(x, largest)
        return numbers.to(x.dtype) * scale

    def steps(self, x: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        """x rounded to float8_e4m3fn, and the scale of each token [..., 1] in the dtype of x."""
        import torch

        scale = largest / self.limit
        scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        return (x / scale).clamp(-self.limit, self.limit).to(torch.float8_e4m3fn), scale
