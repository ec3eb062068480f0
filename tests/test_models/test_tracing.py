"""What `test_survey` and the end-to-end tests do not reach of `models.supertasks`."""

from __future__ import annotations

from pathlib import Path

import pytest
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


@pytest.mark.parametrize("model_type", ["opt", "gpt2"])
def test_the_last_hidden_state_is_that_of_the_module_with_the_layers(model_type: str) -> None:
    """Also where the model's forward calls no base model, as OPT's, which calls its decoder."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    own = {"ffn_dim": 64, "word_embed_proj_dim": 32} if model_type == "opt" else {}
    tracer = Tracer({"model_type": model_type, "dtype": "float32", **sizes, **ends, **own}, {})
    for asked, names in ((False, ["logits"]), (True, ["logits", "last_hidden_state"])):
        graph = tracer.trace(BucketShape(1, 8, 8), Segment(last=True), False, asked).whole
        assert [spec.name for spec in graph.outputs] == names
        assert [spec.shape for spec in graph.outputs] == [[1, 8, 64], [1, 8, 32]][: len(names)]
        decode = tracer.trace(BucketShape(2, 1, 8), Segment(last=True), False, asked).whole
        assert [spec.name for spec in decode.outputs] == ["logits"]
