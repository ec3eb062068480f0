"""Parameters that are not quantized: stored as they are, under their own names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from furiosa_build.ir.dtypes import FLOATS
from furiosa_build.ir.tensors import Layout
from furiosa_build.quant.scheme import Mismatch, QuantScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Unquantized(QuantScheme):
    """Any parameter, not only a linear layer's weight, as one part. A checkpoint may have it in any floating dtype."""

    family = "none"

    @property
    def described(self) -> str:
        return "weights as they are"

    def parts(self, weight: Layout) -> dict[str, Layout]:
        return {"weight": weight}

    def stored_name(self, parameter: str, part: str) -> str:
        del part
        return parameter

    def mismatch(self, part: str, weight: Layout, found: Layout, read: Callable[[], Tensor]) -> Mismatch | None:
        if found.dtype not in FLOATS:
            return Mismatch(f"has dtype {found.dtype}", " or ".join(FLOATS))
        return super().mismatch(part, weight, Layout(weight.dtype, found.shape), read)

    def quantize(self, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight}

    def dequantize(self, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        return stored["weight"].to(dtype)

    def product(self, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        [weight] = operands
        return x @ weight.mT

    def config_group(self) -> dict[str, Any]:
        raise ValueError("a checkpoint's configuration ignores weights that are not quantized")
