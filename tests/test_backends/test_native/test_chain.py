"""Chains: joined into one program, plans give what they give one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from furiosa_build.backends.chain import Link, ProgramByProgram, read_by
from furiosa_build.backends.native.device import NativeDevice
from furiosa_build.backends.native.emit import make_plan
from furiosa_build.backends.native.program import NativeProgram
from furiosa_build.backends.native.tensors import HostTensor

from .graphs import graph_of

DEVICE = NativeDevice()
NAMES = ("a", "b", "c", "d")


def combine(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """With a constant, memory of its own, and two results."""
    total = (x @ y.transpose(0, 1)).softmax(-1) @ x * torch.arange(8.0)
    return total.relu() + y, x + total


def widen(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.cat([x, x * 3], dim=0),)


def numbers(seed: int) -> HostTensor:
    return DEVICE.from_torch(torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def program(library_file: Path) -> NativeProgram:
    return NativeProgram(make_plan(graph_of(combine, [torch.zeros(6, 8)] * 2)), library_file, concurrency=1)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_chain_gives_what_its_programs_give_one_by_one(program: NativeProgram, data: st.DataObject) -> None:
    """Whichever names they read, give anew, and are asked for; the same chain again with other tensors."""
    fixed = numbers(99)
    names = st.sampled_from(NAMES)
    inputs = st.tuples(names, names | st.just(fixed)).map(list)
    outputs = st.lists(names, min_size=2, max_size=2, unique=True)
    links = data.draw(st.lists(st.builds(Link, st.just(program), inputs, outputs), min_size=1, max_size=8))
    made = sorted({name for link in links for name in link.outputs})
    results = data.draw(st.lists(st.sampled_from(made), unique=True))
    joined, one_by_one = DEVICE.chain(links, results), ProgramByProgram(links, results)
    earlier: list[tuple[dict[str, HostTensor], dict[str, HostTensor]]] = []
    for seed in (0, 10):
        given_to = {name: numbers(seed + number) for number, name in enumerate(sorted(read_by(links)))}
        earlier.append((joined.run(dict(given_to)), one_by_one.run(dict(given_to))))
    for found, expected in earlier:
        assert found.keys() == expected.keys() == set(results)
        assert all(np.array_equal(found[name].array, expected[name].array) for name in results)


def test_what_is_handed_on_has_the_size_that_is_taken(program: NativeProgram, library_file: Path) -> None:
    wider = NativeProgram(make_plan(graph_of(widen, [torch.zeros(6, 8)])), library_file, concurrency=1)
    with pytest.raises(ValueError, match=r"'b' has 384 bytes, and is taken for 192"):
        DEVICE.chain([Link(wider, ["a"], ["b"]), Link(program, ["a", "b"], ["c", "d"])], ["c"])
    with pytest.raises(ValueError, match=r"an input of 192 bytes is given as .*12"):
        DEVICE.chain([Link(program, ["a", DEVICE.from_torch(torch.zeros(12, 8))], ["c", "d"])], ["c"])
    chain = DEVICE.chain([Link(wider, ["a"], ["b"])], ["b"])
    with pytest.raises(ValueError, match=r"an input of 192 bytes is given as .*7"):
        chain.run({"a": DEVICE.from_torch(torch.zeros(7, 8))})
