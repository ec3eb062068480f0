"""What `test_survey` and the end-to-end tests do not reach of `models.supertasks`."""

from __future__ import annotations

from pathlib import Path

import torch

from furiosa_build.backends.eager import EagerBackend
from furiosa_build.ir.segment import Segment
from furiosa_build.models.graph_inputs import GraphInputs
from furiosa_build.models.tracing import BucketShape, Tracer

from .tiny import LLAMA


def test_outputs_are_contiguous_whatever_the_model_returns(tmp_path: Path) -> None:
    inputs = GraphInputs()
    inputs.add("x", "activation", (3, 5), torch.float32)
    inputs.add("row", "activation", (1, 5), torch.float32)
    graph = inputs.export(lambda x, row: (x.transpose(0, 1), row.expand(3, 5)), ["turned", "repeated"]).whole
    EagerBackend().compile(graph, tmp_path / "program.json", "any", tmp_path)
    x, row = torch.randn(3, 5), torch.randn(1, 5)
    turned, repeated = EagerBackend().load(tmp_path / "program.json").run([x, row])
    assert turned.is_contiguous()
    assert turned.equal(x.T)
    assert repeated.is_contiguous()
    assert repeated.equal(row.expand(3, 5))


def test_a_graph_takes_only_what_it_reads() -> None:
    tracer = Tracer(LLAMA, {})
    decode = tracer.trace(BucketShape(2, 1, 16), Segment(layers=(0,))).whole
    prefill = tracer.trace(BucketShape(2, 16, 16), Segment(layers=(0,))).whole
    decode_names, prefill_names = ([spec.name for spec in graph.inputs] for graph in (decode, prefill))
    assert {"context_slots", "context_lens"} == set(decode_names) - set(prefill_names)
    assert "position_ids" not in decode_names, "the rotary tables have what it says"
    append = tracer.trace(BucketShape(2, 4, 16), Segment(layers=(0,))).whole
    assert {"context_slots", "position_ids"} == {spec.name for spec in append.inputs} - set(prefill_names)
    assert [spec.name for spec in tracer.trace(BucketShape(1, 1, 8), Segment(first=True)).whole.inputs] == [
        "input_ids",
        "model.embed_tokens.weight",
    ]
