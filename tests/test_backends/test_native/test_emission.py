"""Graphs of single operators of ATen, and drawn chains of them, give what torch gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from furiosa_build.backends.native.emit import make_plan

from .graphs import assert_equal_to_eager, graph_of

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
INDEX = torch.tensor([[0, 3], [-1, 2]])

CASES: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "views": lambda x: (x.T.reshape(3, 8), x[1:, ::2].unsqueeze(1), x.expand(2, 4, 6).select(0, 1)),
    "concatenations": lambda x: (torch.cat([x * 2, x, x * 3], -1), torch.cat([x, x[:1]])),
    "reductions": lambda x: (x.sum(0), x.mean(-1, keepdim=True), x.amax((0, 1)), x.argmax(1), x.sum()),
    "truth of any or all": lambda x: ((x > 1).any(), (x > 1).any(0), (x > -1).all(-1, keepdim=True)),
    "softmaxes": lambda x: (x.softmax(0), F.log_softmax(x, -1)),
    "padding": lambda x: (F.pad(x, (1, 2, 0, 1), value=3.0), F.pad(x, (-1, 0)), x.repeat(2, 1, 2)),
    "layer norm": lambda x: (F.layer_norm(x, (6,)), F.layer_norm(x, (6,), x[0], x[1])),
    "rms norm": lambda x: (F.rms_norm(x, (6,), x[0], 1e-5), F.rms_norm(x, (6,))),
    "products": lambda x: (
        x @ x.T,
        torch.bmm(x[None], x.T[None]),
        F.linear(x, x, x[0, :4]),
        torch.addmm(x[0, :4], x, x.T),
    ),
    "choices": lambda x: (
        torch.where(x > 0, x, -x),
        x.masked_fill(x < 0, float("-inf")),
        x.clamp(-0.5, 0.5),
        x.relu(),
    ),
    "activations": lambda x: (F.gelu(x, approximate="tanh"), F.silu(x), F.softplus(x), F.leaky_relu(x), F.elu(x)),
    "exact gelu": lambda x: (F.gelu(x),),
    "bounds": lambda x: (F.hardtanh(x), F.relu6(x), F.hardswish(x)),
    "powers": lambda x: (x**2, x**3, x.abs() ** 0.5, (x.abs() + 1) ** -0.5, x.abs() ** 1.7, 2.0**x),
    "constants": lambda x: (x + torch.arange(6) * 2, torch.full_like(x, 3.0), x * torch.ones(6)),
    "outputs that are inputs, or the same": lambda x: (x.clone(), x * 2, (x * 2).T),
    "halves": lambda x: (x.bfloat16() * 3, (x.half() * 2).float(), x.to(torch.float64)),
    "largest": lambda x: (*x.topk(3), *x.topk(2, 1), *x.max(0), *x.max(-1, keepdim=True)),
    "marks": lambda x: (torch.zeros_like(x).scatter(1, x.topk(2).indices, 1.0), x.scatter(-1, x.topk(1).indices, 3)),
    "splits": lambda x: (*(part * 2 for part in x.split([1, 5], -1)), *(part + 1 for part in x.unbind(0))),
}
INDEXED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "indices": lambda x, i: (x[i], x[i, i], x.index_select(1, i[0]), x.gather(1, i.abs()), x[:, i], x[None][:, i, i]),
    "integers": lambda _, i: (i // 2, i % 2, i * 3 - 1, -i, i == 2, (i > 0) & (i < 3), ~(i > 0), i.float() / 2),
}


@pytest.mark.parametrize("name", CASES)
def test_operators_give_what_torch_gives(name: str, library_file: Path) -> None:
    assert_equal_to_eager(graph_of(CASES[name], [X]), [X], library_file)


SPECIAL = X.clone()
SPECIAL[0, 1], SPECIAL[1, 2], SPECIAL[2, 4], SPECIAL[3, :2] = (
    torch.nan,
    torch.inf,
    -torch.inf,
    torch.tensor([3e4, -0.0]),
)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"exact gelu"}))  # torch's of infinity is NaN, or not
def test_nan_and_infinity_go_through_as_in_torch(name: str, library_file: Path) -> None:
    assert_equal_to_eager(graph_of(CASES[name], [SPECIAL]), [SPECIAL], library_file)


@pytest.mark.parametrize("name", INDEXED)
def test_operators_of_integers_give_what_torch_gives(name: str, library_file: Path) -> None:
    assert_equal_to_eager(graph_of(INDEXED[name], [X, INDEX]), [X, INDEX], library_file)


STEPS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a + b,
    lambda a, b: a - 2 * b,
    lambda a, b: a * b,
    lambda a, b: torch.maximum(a, b),
    lambda a, b: torch.where(a < b, a, b * 0.5),
    lambda a, b: torch.tanh(a) + b[:1],
    lambda a, b: a.sigmoid().T.reshape(b.shape),
    lambda a, b: torch.cat([a[:, 3:], b[:, :3]], 1),
    lambda a, b: a * b.mean(-1, keepdim=True),
    lambda a, b: a.bfloat16().float() + b,
    lambda a, b: a.softmax(-1) @ b.T @ b,
]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(range(len(STEPS))), st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_drawn_graphs_give_what_torch_gives(library_file: Path, drawn: list[tuple[int, int, int]]) -> None:
    """Each step takes two of the values so far; the last three are returned."""

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = list(inputs)
        for step, left, right in drawn:
            values.append(STEPS[step](values[left % len(values)], values[right % len(values)]))
        return tuple(value.clone() for value in values[-3:])

    inputs = [torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert_equal_to_eager(graph_of(function, inputs), inputs, library_file, tolerance=2e-2)


def test_a_product_that_waits_for_another_of_the_same_input_is_a_call_of_its_own(library_file: Path) -> None:
    """Others of one input are one call."""

    def products(x: Tensor, one: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        first, beside = F.linear(x, one), F.linear(x, other)
        return beside, F.linear(x, other) + torch.tanh(first)

    inputs = [X, torch.randn(8, 6), torch.randn(8, 6)]
    graph = graph_of(products, inputs, parameters=2)
    assert [len(call.ints) for call in make_plan(graph).calls if call.op == "linear"] == [2, 1]
    assert_equal_to_eager(graph, inputs, library_file)
