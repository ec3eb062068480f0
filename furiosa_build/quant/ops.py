"""The operator that a trace has for a layer with a quantized weight. Its reference is the scheme's own arithmetic.

A backend may lower it to a formulation of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from furiosa_build.quant.scheme import scheme as find_scheme

QUANTIZED_LINEAR = "furiosa.quantized_linear.default"
"""The operator, as graphs name it."""


def quantized_linear_reference(x: Tensor, weight: list[Tensor], largest: Tensor | None, scheme: str) -> Tensor:
    """The product of x with the transposed weight, without a bias.

    Args:
        x: [..., in].
        weight: The operands of the scheme, in order: `QuantScheme.operands`.
        largest: [..., 1], of each token the largest magnitude over all ranks, where x is a rank's share of it; None: x
            is all there is. Read where the scheme rounds activations.
        scheme: The scheme, as text.

    Returns:
        [..., out], of the dtype of x.
    """
    own = find_scheme(scheme)
    if own.rounds_activations:
        x = own.round(x, x.abs().amax(-1, keepdim=True) if largest is None else largest)
    return own.product(x, weight)


quantized_linear = torch.library.custom_op("furiosa::quantized_linear", quantized_linear_reference, mutates_args=())


@quantized_linear.register_fake
def _(x: Tensor, weight: list[Tensor], largest: Tensor | None, scheme: str) -> Tensor:
    del largest, scheme
    return x.new_empty((*x.shape[:-1], weight[0].shape[0]))
