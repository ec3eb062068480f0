"""How fast one compiled decoder layer is, by quantization and bucket: `python benchmarks/block.py [SCHEMES] [BUCKETS]`.

The layer has the shape of Llama-3.2-1B (121.6 MB in bfloat16). Times are processor time of one thread, the least of 15
runs, so that a busy machine disturbs them little: compare rows of one run. Buckets are batch x query x context, as in
`block.py none,int8 1x1x1024,1x512x512`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from furiosa_build.backends.base import LoadedProgram
from furiosa_build.backends.graph import Graph
from furiosa_build.backends.inductor import InductorBackend
from furiosa_build.ir.segment import Segment
from furiosa_build.models.tracing import BucketShape, Tracer

CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_hidden_layers": 1,
    "vocab_size": 1024,
    "dtype": "bfloat16",
}
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def main(schemes: list[str], buckets: list[BucketShape]) -> None:
    torch.set_num_threads(1)
    backend = InductorBackend()
    isa = backend.isa("native")
    print(f"torch {torch.__version__}, {isa}")
    print(f"{'scheme':8} {'bucket':>12} {'compile s':>10} {'run ms':>8} {'GB/s':>6} GFLOP/s")
    with tempfile.TemporaryDirectory() as work:
        for scheme in schemes:
            quantized = {f"model.layers.0.{name}.weight": scheme for name in LINEARS if scheme != "none"}
            tracer = Tracer(CONFIG, quantized)  # type: ignore[arg-type]
            for shape in buckets:
                graph = tracer.trace(shape, Segment(layers=(0,))).whole
                name = f"{shape.batch}x{shape.query}x{shape.context}"
                library = Path(work) / f"{scheme}-{name}.so"  # one path, one library: the loader knows it by its name
                begin = time.monotonic()
                backend.compile(graph, library, isa, Path(work) / "scratch")
                compiled = time.monotonic() - begin
                inputs = make_inputs(graph, shape)
                seconds = fastest(backend.load(library), inputs)
                size = sum(t.nbytes for t, spec in zip(inputs, graph.inputs, strict=True) if spec.role == "parameter")
                flops = 2 * shape.batch * shape.query * 60.8e6
                print(
                    f"{scheme:8} {name:>12} {compiled:10.1f} {seconds * 1e3:8.2f} {size / seconds / 1e9:6.1f} "
                    f"{flops / seconds / 1e9:7.0f}",
                    flush=True,
                )


def make_inputs(graph: Graph, shape: BucketShape) -> list[torch.Tensor]:
    """Random parameters; sequences that lie one after the other in the cache, full to the last token."""
    slots = torch.arange(shape.batch * shape.context).reshape(shape.batch, shape.context)
    fixed = {
        "slot_mapping": slots[:, -shape.query :].contiguous(),
        "context_slots": slots,
        "context_lens": torch.full((shape.batch,), shape.context),
    }
    return [
        fixed[spec.name] if spec.name in fixed else random_tensor(spec.dtype, spec.shape, slots.numel())
        for spec in graph.inputs
    ]


def random_tensor(dtype: str, shape: list[int | None], slots: int) -> torch.Tensor:
    sizes = [slots if size is None else size for size in shape]
    if dtype == "uint8":
        return torch.randint(0, 256, sizes, dtype=torch.uint8)
    return (torch.randn(sizes) * 0.02).to(getattr(torch, dtype))


def fastest(program: LoadedProgram, inputs: list[torch.Tensor]) -> float:
    for _ in range(3):
        program.run(inputs)
    times = []
    for _ in range(15):
        begin = time.thread_time()
        program.run(inputs)
        times.append(time.thread_time() - begin)
    return min(times)


if __name__ == "__main__":
    arguments = [*sys.argv[1:], *["none,int8,fp8", "1x1x1024,8x1x1024,1x512x512"][len(sys.argv) - 1 :]]
    main(arguments[0].split(","), [BucketShape(*map(int, text.split("x"))) for text in arguments[1].split(",")])
