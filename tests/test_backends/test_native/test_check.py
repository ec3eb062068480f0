"""What a plan could do outside of its buffers is found before it runs: changed plans are refused, or do no harm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from furiosa_build.backends.graph import Graph
from furiosa_build.backends.native.check import check_plan
from furiosa_build.backends.native.emit import make_plan
from furiosa_build.backends.native.packing import pack
from furiosa_build.backends.native.plan import Plan
from furiosa_build.backends.native.pointwise import INSTRUCTIONS, MOST_REGISTERS, STORE
from furiosa_build.backends.native.program import NativeProgram

from .graphs import BUCKETS, graph_of, model, run_on_torch, trace

IDS, TABLE = torch.tensor([[1, 4, 2], [0, 3, 1]]), torch.randn(8, 16)
WEIGHT, NORM = torch.randn(16, 16), torch.randn(16)
INPUTS = [IDS, TABLE, WEIGHT, NORM]
_MOST_ELEMENTS = 100_000


def mixed(ids: Any, table: Any, weight: Any, norm: Any) -> tuple[Any, ...]:
    x = F.rms_norm(F.embedding(ids, table), (16,), norm, 1e-5)
    y = F.linear(x, weight) + x
    shares = (y @ y.transpose(1, 2)).softmax(-1) @ x
    return torch.cat([shares.sum(1), y[:, 0], torch.tanh(x[ids[:, 0], ids[:, 1] % 2])], -1), y.argmax(-1)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(mixed, INPUTS, parameters=3)


@pytest.fixture(scope="module")
def plan(graph: Graph) -> Plan:
    return make_plan(graph)


@pytest.fixture(scope="module")
def decode_plan() -> Plan:
    return make_plan(trace(model("llama"), BUCKETS["decode"]))


def run(plan: Plan, library: Path) -> list[torch.Tensor]:
    return run_on_torch(NativeProgram(plan, library, concurrency=1), [IDS, *map(pack, INPUTS[1:])])


def test_plans_that_emission_makes_hold(plan: Plan, decode_plan: Plan, library_file: Path) -> None:
    check_plan(decode_plan)
    found, expected = run(plan, library_file), mixed(*INPUTS)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    assert found[1].equal(expected[1])


CHANGES: dict[str, tuple[str, Any]] = {
    "its arena is smaller": ("arena", 64),
    "a tensor is of no buffer": ("tensors.0.buffer", 99),
    "a tensor begins outside": ("tensors.3.offset", 1 << 20),
    "a tensor begins within an element": ("tensors.1.offset", 3),
    "a tensor has a stride too few": ("tensors.2.stride", [1]),
    "an operator is unknown": ("calls.0.op", "system"),
    "an operand is not there": ("calls.2.tensors.0", 10_000),
    "a call writes to an input": ("calls.0.tensors.2", 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_refused_by_their_place(change: str, plan: Plan) -> None:
    path, value = CHANGES[change]
    with pytest.raises(ValueError, match=r"tensors\[|calls\["):
        check_plan(_changed(plan, path.split("."), value))


def test_a_register_is_read_after_it_is_written(plan: Plan) -> None:
    number, call = next((n, call) for n, call in enumerate(plan.calls) if call.op == "pointwise")
    code = call.ints[1:]
    store = next(at for at in range(0, len(code), 5) if code[at] == INSTRUCTIONS[STORE].code)
    for register in (MOST_REGISTERS - 1, MOST_REGISTERS):
        with pytest.raises(ValueError, match="reads what is not there"):
            check_plan(_changed(plan, ["calls", number, "ints", 1 + store + 2], register))


def test_a_reduction_keeps_the_kind_of_its_numbers(plan: Plan) -> None:
    """A sum of floating-point numbers into int64, where the place of the largest belongs."""
    number = next(n for n, call in enumerate(plan.calls) if call.op == "reduce" and call.ints[0] == 4)
    with pytest.raises(ValueError, match="numbers of one kind become the other"):
        check_plan(_changed(plan, ["calls", number, "ints", 0], 0))


def test_what_is_read_as_a_cache_is_one(decode_plan: Plan) -> None:
    """The library takes slots of it that only the runtime knows the number of."""
    number, call = next((n, call) for n, call in enumerate(decode_plan.calls) if call.op == "paged_attention")
    cache = decode_plan.tensors[call.tensors[1] or 0]
    elsewhere = cache.model_copy(update={"buffer": decode_plan.num_buffers, "offset": 0})
    moved = decode_plan.model_copy(update={"tensors": [*decode_plan.tensors, elsewhere]})
    check_plan(moved)
    with pytest.raises(ValueError, match=f"calls.{number}., paged_attention: a cache is not one"):
        check_plan(_changed(moved, ["calls", number, "tensors", 1], len(decode_plan.tensors)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_number_is_refused_or_does_no_harm(plan: Plan, library_file: Path, data: st.DataObject) -> None:
    places = list(_places(json.loads(plan.to_json())))
    path = data.draw(st.sampled_from(places))
    value = data.draw(st.one_of(st.integers(-2, 40), st.sampled_from([64, 1 << 31, 1 << 47, -(1 << 63), "x", None])))
    try:
        changed = _changed(plan, path, value)
        check_plan(changed)
    except ValueError:
        return
    if all(torch.Size(view.shape).numel() < _MOST_ELEMENTS for view in changed.tensors) and _is_small(changed):
        try:
            run(changed, library_file)
        except ValueError:  # of the size of an input
            return


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_flipped_bytes_are_refused_or_hold(decode_plan: Plan, data: st.DataObject) -> None:
    text = bytearray(decode_plan.to_json())
    text[data.draw(st.integers(0, len(text) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        check_plan(Plan.model_validate_json(bytes(text)))
    except ValueError:
        return


def _is_small(plan: Plan) -> bool:
    return all(torch.Size([size or 0 for size in spec.shape]).numel() < _MOST_ELEMENTS for spec in plan.outputs)


def _places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to each number of a plan."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, str(key)))
    elif not isinstance(value, str):
        yield path


def _changed(plan: Plan, path: Any, value: Any) -> Plan:
    data: Any = json.loads(plan.to_json())
    inner = data
    for key in path[:-1]:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[int(path[-1]) if isinstance(inner, list) else path[-1]] = value
    return Plan.model_validate_json(json.dumps(data))
