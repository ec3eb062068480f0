"""Complex numbers in programs, and from one to the next."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from furiosa_build.backends.native.emit import make_plan
from furiosa_build.core.errors import UserError

from .graphs import assert_equal_to_eager, graph_of, run_plan


def test_rotation_by_complex_factors(library_file: Path) -> None:
    def rotate(x: Tensor, angle: Tensor) -> tuple[Tensor, ...]:
        factors = torch.polar(torch.ones_like(angle), angle) * 1.5
        rotated = torch.view_as_complex(x.reshape(3, 4, 5, 2)) * factors.unsqueeze(-2)
        return (torch.view_as_real(rotated * angle.unsqueeze(1)),)

    inputs = [torch.randn(3, 4, 10), torch.randn(3, 5)]
    assert_equal_to_eager(graph_of(rotate, inputs), inputs, library_file)


def test_complex_inputs_and_outputs_are_the_same_bytes(library_file: Path) -> None:
    def multiply(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return (x * y, x.unsqueeze(0))

    inputs = [torch.randn(3, 5, dtype=torch.complex64) for _ in range(2)]
    graph = graph_of(multiply, inputs)
    for found, expected in zip(run_plan(make_plan(graph), library_file, graph, inputs), multiply(*inputs), strict=True):
        torch.testing.assert_close(torch.view_as_complex(found), expected)


def test_an_operator_that_is_not_known_of_complex_numbers_is_refused_by_name() -> None:
    graph = graph_of(lambda x: (torch.sin(x),), [torch.ones(4, dtype=torch.complex64)])
    with pytest.raises(UserError, match=r"no kernel for aten\.sin\.default of complex numbers"):
        make_plan(graph)
