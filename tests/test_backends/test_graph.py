from __future__ import annotations

import contextlib
import copy
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim

from furiosa_build.backends.graph import Graph, dtype_name
from furiosa_build.backends.graph_interpreter import GraphInterpreter
from furiosa_build.backends.lowering import export
from furiosa_build.ir.tensors import TensorSpec

REFUSED = (ValueError, TypeError, RuntimeError)
"""What loading a program may raise: the executor turns these into one message."""


class Everything(nn.Module):
    """One of each thing that a graph can hold."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(-1, 1, 6), persistent=False)

    def forward(self, unused: Tensor, x: Tensor, cache: Tensor, written: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        del unused
        cache.index_copy_(0, slots, x)
        written.index_copy_(0, slots, x)  # and never read
        best, place = torch.max(x * self.table, dim=-1)  # one of several results
        masked = torch.full_like(x, float("-inf")).masked_fill(x > 0, 1.5)  # a float that JSON has no form for
        free = torch.arange(cache.shape[0] * 2 + 3)  # arithmetic on a free dimension
        gathered = cache[slots].to(torch.bfloat16)  # a list of tensors, a dtype
        return best, place, masked, free.sum(), gathered


def specs() -> list[TensorSpec]:
    return [
        TensorSpec(name="unused", role="activation", dtype="float32", shape=[2]),
        TensorSpec(name="x", role="activation", dtype="float32", shape=[3, 6]),
        TensorSpec(name="cache", role="kv_cache", dtype="float32", shape=[None, 6]),
        TensorSpec(name="written", role="kv_cache", dtype="float32", shape=[None, 6]),
        TensorSpec(name="slots", role="activation", dtype="int64", shape=[3]),
    ]


def example(slots: int = 9) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    random = [torch.randn(shape, generator=generator) for shape in ((2,), (3, 6), (slots, 6), (slots, 6))]
    return [*random, torch.tensor([7, 0, 4])]


def traced() -> Graph:
    dynamic: Any = ({}, {}, {0: Dim("slots", min=2)}, {0: Dim("slots", min=2)}, {})
    program = torch.export.export(Everything(), tuple(example()), dynamic_shapes=dynamic)
    return Graph.from_exported(program, specs(), ["best", "place", "masked", "free", "gathered"])


@pytest.fixture(scope="module")
def graph() -> Graph:
    return traced()


@pytest.mark.parametrize("slots", [9, 30])
def test_a_graph_read_from_json_gives_the_numbers_of_the_function(graph: Graph, slots: int) -> None:
    again = Graph.from_json(graph.to_json())
    arguments, expected_arguments = example(slots), example(slots)
    expected = Everything()(*expected_arguments)
    assert not arguments[2].equal(expected_arguments[2]), "the function has not written"
    found = GraphInterpreter(again)(*arguments[1:])
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.equal(other)
    for found_cache, expected_cache in zip(arguments[2:4], expected_arguments[2:4], strict=True):
        assert found_cache.equal(expected_cache), "a cache is not written in place"


def test_a_graph_says_what_goes_in_and_out(graph: Graph) -> None:
    assert [spec.name for spec in graph.inputs] == ["x", "cache", "written", "slots"], "an unused input stays"
    assert graph.inputs[1].shape == [None, 6]
    assert [(spec.name, spec.dtype, spec.shape) for spec in graph.outputs] == [
        ("best", "float32", [3]),
        ("place", "int64", [3]),
        ("masked", "float32", [3, 6]),
        ("free", "int64", []),
        ("gathered", "bfloat16", [3, 6]),
    ]


def test_two_traces_give_the_same_bytes(graph: Graph) -> None:
    assert traced().to_json() == graph.to_json()
    assert Graph.from_json(graph.to_json()).to_json() == graph.to_json()


def test_a_graph_exported_again_gives_the_same_numbers_with_any_number_of_slots(graph: Graph) -> None:
    program, examples = export(graph, {})
    assert [tuple(e.shape) for e in examples] == [(3, 6), (64, 6), (64, 6), (3,)]
    arguments, expected_arguments = example(21), example(21)
    expected = Everything()(*expected_arguments)
    for one, other in zip(program.module()(*arguments[1:]), expected, strict=True):
        assert one.equal(other)
    assert arguments[2].equal(expected_arguments[2])


@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]),
    st.lists(st.integers(1, 4), max_size=3),
)
def test_constants_keep_every_bit(dtype: torch.dtype, shape: list[int]) -> None:
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    data = bytearray((37 * i + 1) % (2 if dtype == torch.bool else 251) for i in range(size))
    value = torch.frombuffer(data, dtype=dtype).reshape(shape)

    class Holds(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (torch.where(x > 0, value, value),)

    program = torch.export.export(Holds(), (torch.ones(()),))
    spec = TensorSpec(name="x", role="activation", dtype="float32", shape=[])
    graph = Graph.from_exported(program, [spec], ["y"])
    (found,) = GraphInterpreter(Graph.from_json(graph.to_json()))(torch.ones(()))
    assert found.dtype == dtype
    assert found.contiguous().reshape(-1).view(torch.uint8).equal(torch.frombuffer(data, dtype=torch.uint8))


def test_dtype_names_are_torch_s_own() -> None:
    assert [dtype_name(d) for d in (torch.bfloat16, torch.float8_e4m3fn)] == ["bfloat16", "float8_e4m3fn"]


# A program is a file of an artifact that someone was given: it may do what ATen does to tensors, and nothing else.

PLAIN: dict[str, Any] = {
    "schema_version": 1,
    "inputs": [{"name": "x", "role": "activation", "dtype": "float32", "shape": [2]}],
    "constants": [],
    "nodes": [{"op": "aten.relu.default", "args": [{"ref": 0}], "kwargs": {}}],
    "results": [1],
    "outputs": [{"name": "y", "role": "activation", "dtype": "float32", "shape": [2]}],
}


def with_call(op: str, args: list[Any], **kwargs: Any) -> dict[str, Any]:
    return {"nodes": [{"op": op, "args": args, "kwargs": kwargs}]}


def with_constant(**changes: Any) -> dict[str, Any]:
    constant = {"dtype": "float32", "shape": [1], "data": "AAAAAA==", **changes}
    return {"constants": [constant], "nodes": [], "results": [1]}


def module_of(changes: dict[str, Any]) -> nn.Module:
    return GraphInterpreter(Graph.from_json(json.dumps({**PLAIN, **changes}).encode()))


def test_the_plain_graph_that_the_hostile_ones_derive_from_is_taken() -> None:
    assert module_of({})(torch.tensor([-1.0, 2.0]))[0].tolist() == [0.0, 2.0]
    assert module_of(with_constant())(torch.zeros(2))[0].tolist() == [0.0]


@pytest.mark.parametrize(
    "op",
    [
        "os.system",
        "builtins.eval",
        "operator.attrgetter",
        "operator.methodcaller",
        "operator.setitem",
        "operator.call",
        "operator.__builtins__",
        "prims.add.default",
        "inductor._reinterpret_tensor.default",
        "furiosa.all_reduce.default",
        "furiosa.paged_attention",
        "furiosa.paged_attention.default.__call__",
        "furiosa.paged_attention.default\nimport os",
        "aten",
        "aten.relu",
        "aten.relu.",
        "aten..default",
        "aten.no_such_operator.default",
        "aten.relu.no_such_overload",
        "aten.relu.__class__",
        "aten.relu._schema",
        "aten.relu.default.__call__",
        "aten.__class__.__call__",
        "aten.__dict__.get",
        "aten._dir.append",
        "aten.relu.default\nimport os",
        "",
    ],
)
def test_operators_that_are_not_listed_are_refused(op: str) -> None:
    with pytest.raises(REFUSED):
        module_of(with_call(op, [{"ref": 0}]))


@pytest.mark.parametrize("op", ["getitem", "add", "sub", "mul"])
def test_the_listed_python_operators_take_two_values(op: str) -> None:
    module_of(with_call(f"operator.{op}", [{"ref": 0}, 1]))
    for args in ([{"ref": 0}], [{"ref": 0}, 1, 2], [None, None], [1, 1], [{"ref": 0}, "a"], [{"ref": 0}, 0.5]):
        with pytest.raises(REFUSED):
            module_of(with_call(f"operator.{op}", args))
    with pytest.raises(REFUSED):
        module_of(with_call(f"operator.{op}", [{"ref": 0}, 1], a=1))


@pytest.mark.parametrize("op", ["from_file.default", "from_file.out", "save.default"])
def test_no_operator_may_open_a_file(op: str, tmp_path: Path) -> None:
    with pytest.raises(REFUSED):
        module_of(with_call(f"aten.{op}", [str(tmp_path / "made"), True, 16]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "self=(__import__('pathlib').Path({path!r}).touch(), input_0)[1], other",
        "self, *[__import__('pathlib').Path({path!r}).touch()], other",
        "no_such_argument",
        "from",
        "",
        "self ",
        "__class__",
    ],
)
def test_names_of_arguments_are_the_operator_s_own(name: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    call = with_call("aten.relu.default", [], **{name.format(path=str(made)): {"ref": 0}})
    with pytest.raises(REFUSED):
        module_of(call)(torch.zeros(2))
    assert not made.exists(), "reading a graph has run code"


def test_text_arguments_stay_text(tmp_path: Path) -> None:
    made = tmp_path / "made"
    text = f"tanh' or __import__('pathlib').Path({str(made)!r}).touch() or '"
    with pytest.raises(REFUSED):
        module_of(with_call("aten.gelu.default", [{"ref": 0}], approximate=text))(torch.zeros(2))
    assert not made.exists()


@pytest.mark.parametrize("reference", [-1, 1, 2, 10**30, -(10**30), 0.5, "0", None, [0]])
def test_references_to_no_value_are_refused(reference: Any) -> None:
    with pytest.raises(REFUSED):
        module_of(with_call("aten.relu.default", [{"ref": reference}]))


@pytest.mark.parametrize("results", [[-1], [2], [10**30], [None], 1])
def test_results_that_are_no_value_are_refused(results: Any) -> None:
    with pytest.raises(REFUSED):
        module_of({"results": results})


@pytest.mark.parametrize(
    "argument",
    [
        {"torch": "load"},
        {"torch": "nn"},
        {"torch": "no_such_dtype"},
        {"torch": "float32.__class__"},
        {"device": "no such device"},
        {"float": "one"},
        {"unknown": 1},
        {},
        {"ref": 0, "torch": "float32", "args": []},
    ],
)
def test_odd_arguments_are_refused(argument: Any) -> None:
    with pytest.raises(REFUSED):
        module_of(with_call("aten._to_copy.default", [{"ref": 0}], dtype=argument))(torch.zeros(2))


@pytest.mark.parametrize("number", [10**30, -(10**30), 1e300])
def test_numbers_that_do_not_fit_are_refused_at_the_latest_when_they_are_used(number: float) -> None:
    with pytest.raises((*REFUSED, OverflowError)):
        module_of(with_call("aten.select.int", [{"ref": 0}, 0, number]))(torch.zeros(2))


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "no_such_dtype"},
        {"dtype": "load"},
        {"dtype": "float64"},
        {"data": "AAA"},
        {"data": "!!!!"},
        {"data": ""},
        {"shape": [2]},
        {"shape": [-2]},
        {"shape": [2**62]},
        {"shape": [10**30]},
        {"shape": "1"},
        {"path": "/etc/passwd"},
    ],
)
def test_constants_that_do_not_fit_their_bytes_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(REFUSED):
        module_of(with_constant(**changes))


@pytest.mark.parametrize(
    "changes", [{"schema_version": 2}, {"code": "1"}, {"nodes": None}, {"inputs": [{"name": "x"}]}]
)
def test_json_of_another_form_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="GraphData"):
        module_of(changes)


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_graph_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="GraphData"):
        Graph.from_json(text)


@cache
def traced_once() -> bytes:
    return traced().to_json()


@given(st.data())
def test_a_mangled_graph_is_taken_or_refused_and_nothing_else(data: st.DataObject) -> None:
    tree = json.loads(traced_once())
    node = data.draw(st.sampled_from(tree["nodes"]))
    junk = st.one_of(st.none(), st.integers(), st.text(max_size=5), st.just({"ref": 99}), st.just([{"ref": -1}]))
    match data.draw(st.sampled_from(["op", "args", "kwargs", "drop"])):
        case "op":
            node["op"] = data.draw(st.text(max_size=12) | st.sampled_from(["aten." + node["op"], node["op"][:-1]]))
        case "args":
            node["args"] = data.draw(st.lists(junk, max_size=4))
        case "kwargs":
            node["kwargs"] = data.draw(st.dictionaries(st.text(max_size=8), junk, min_size=1, max_size=2))
        case _:
            tree["nodes"].remove(node)
    with contextlib.suppress(*REFUSED):
        GraphInterpreter(Graph.from_json(json.dumps(tree).encode()))


def test_reading_the_json_needs_no_model_code() -> None:
    script = "import sys, furiosa_build.backends.graph; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


def test_a_graph_is_data(graph: Graph) -> None:
    before = graph.to_json()
    GraphInterpreter(graph)
    export(graph, {})
    assert copy.deepcopy(graph).to_json() == before


@given(st.sets(st.sampled_from(["x", "slots"])))
def test_inputs_become_constants(embedded: set[str]) -> None:
    graph = traced()
    values = dict(zip((spec.name for spec in specs()), example(), strict=True))
    numbers = {i: values[spec.name] for i, spec in enumerate(graph.inputs) if spec.name in embedded}
    held = Graph.from_json(graph.embed(numbers).to_json())
    assert [spec.name for spec in held.inputs] == [spec.name for spec in graph.inputs if spec.name not in embedded]
    assert len(held.data.constants) == len(graph.data.constants) + len(embedded)
    expected = GraphInterpreter(graph)(*(values[spec.name].clone() for spec in graph.inputs))
    found = GraphInterpreter(held)(*(values[spec.name].clone() for spec in held.inputs))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
