"""Traced graphs with inputs, and both ways to run them: as plans of the native backend, and by the eager one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from furiosa_build.backends.graph import Graph, export_module
from furiosa_build.backends.graph_interpreter import GraphInterpreter
from furiosa_build.backends.native.device import NativeDevice
from furiosa_build.backends.native.emit import make_plan
from furiosa_build.backends.native.packing import pack
from furiosa_build.backends.native.plan import Plan
from furiosa_build.backends.native.program import NativeProgram
from furiosa_build.ir.segment import Segment
from furiosa_build.ir.tensors import TensorSpec
from furiosa_build.models.tracing import BucketShape, Tracer

from .calls import lay_out_cache, read_cache

BUCKETS = {"prefill": BucketShape(2, 16, 16), "append": BucketShape(2, 4, 16), "decode": BucketShape(2, 1, 16)}
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def model(model_type: str, **fields: Any) -> dict[str, Any]:
    """The fields of a small config.json."""
    return {
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 100,
        "pad_token_id": 0,
        "dtype": "float32",
        **fields,
    }


def trace(config: Mapping[str, Any], bucket: BucketShape, scheme: str = "none") -> Graph:
    """A whole model of two layers in one graph."""
    names = [f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in LINEARS]
    schemes = {} if scheme == "none" else dict.fromkeys(names, scheme)
    segment = Segment(first=True, layers=(0, 1), last=True)
    return Tracer(config, schemes).trace(bucket, segment, last_token_only=bucket.query > 1).whole


def graph_of(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], parameters: int = 0) -> Graph:
    """The graph of a function; the last inputs are parameters."""

    class Module(nn.Module):
        def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
            return function(*values)

    roles = ["activation"] * (len(inputs) - parameters) + ["parameter"] * parameters
    specs = [
        TensorSpec(name=f"i{n}", role=role, dtype=str(x.dtype).removeprefix("torch."), shape=list(x.shape))  # type: ignore[arg-type]
        for n, (x, role) in enumerate(zip(inputs, roles, strict=True))
    ]
    program, _ = export_module(Module(), specs)
    count = len(program.graph_signature.user_outputs)
    return Graph.from_exported(program, specs, [f"o{n}" for n in range(count)], keeps_inputs=True)


def make_inputs(graph: Graph, bucket: BucketShape) -> list[Tensor]:
    """Random numbers; sequences that lie one behind the other in the cache, full to the last token."""
    generator = torch.Generator().manual_seed(0)
    slots = torch.arange(bucket.batch * bucket.context).reshape(bucket.batch, bucket.context)
    fixed = {
        "input_ids": torch.randint(0, 100, (bucket.batch, bucket.query), generator=generator),
        "slot_mapping": slots[:, -bucket.query :].contiguous(),
        "context_slots": slots,
        "context_lens": torch.full((bucket.batch,), bucket.context),
        "position_ids": torch.arange(bucket.context - bucket.query, bucket.context)
        .expand(bucket.batch, -1)
        .contiguous(),
        "logits_indices": torch.full((bucket.batch,), bucket.query - 1),
    }
    return [fixed[s.name] if s.name in fixed else _random(s, slots.numel(), generator) for s in graph.inputs]


def _random(spec: TensorSpec, slots: int, generator: torch.Generator) -> Tensor:
    shape, dtype = [slots if size is None else size for size in spec.shape], getattr(torch, spec.dtype)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    numbers = torch.randn(shape, generator=generator) / 4
    if spec.name.endswith("weight_scale"):
        numbers = numbers.abs() / 400 + 1e-3
    return (numbers + 1 if spec.name.endswith("norm.weight") else numbers).to(dtype)


def run_plan(plan: Plan, library: Path, graph: Graph, inputs: Sequence[Tensor], threads: int = 1) -> list[Tensor]:
    """What a plan gives that has gone through its file; parameters are packed first."""
    program = NativeProgram(Plan.model_validate_json(plan.to_json()), library, concurrency=threads)
    return run_on_torch(
        program, [pack(x) if spec.role == "parameter" else x for x, spec in zip(inputs, graph.inputs, strict=True)]
    )


def run_on_torch(program: NativeProgram, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Runs a program in the memory of torch's tensors."""
    device = NativeDevice()
    return [device.to_torch(tensor) for tensor in program.run([device.from_torch(x) for x in inputs])]


def assert_equal_to_eager(graph: Graph, inputs: Sequence[Tensor], library: Path, tolerance: float = 1e-5) -> Plan:
    """A graph gives the same by both, caches included. The tolerance is relative to the largest number."""
    plan, own = make_plan(graph), [x.clone() for x in inputs]
    own = [x if part is None else lay_out_cache(x, part) for x, part in zip(own, _parts(graph), strict=True)]
    expected = [*GraphInterpreter(graph)(*inputs), *_caches(graph, inputs)]
    found = [*run_plan(plan, library, graph, own)]
    found += [read_cache(x, part) for x, part in zip(own, _parts(graph), strict=True) if part is not None]
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        atol = tolerance * (float(other.double().abs().nan_to_num(0, 0).max()) if other.numel() else 0)
        torch.testing.assert_close(one, other, rtol=0, atol=atol, equal_nan=True)
    return plan


def _parts(graph: Graph) -> list[str | None]:
    """What the inputs are caches of."""
    return [{"key_cache": "keys", "value_cache": "values"}.get(spec.name) for spec in graph.inputs]


def _caches(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x for x, spec in zip(inputs, graph.inputs, strict=True) if spec.role == "kv_cache"]
