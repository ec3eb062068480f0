"""Where a layer's time goes with backend native: `python benchmarks/layer.py [SCHEMES] [BUCKETS]`.

The layer and the buckets are those of block.py. Each call of the plan is a program of its own here, so that it can be
timed; equal calls are one line. `whole` is the plan as it is; `--inductor` adds the layer of that backend. Times are
medians, in milliseconds, of rounds in which everything has its turn: of the clock, or, with `--threads 1`, of the
processor, which other work disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from block import CONFIG, LINEARS, make_inputs
from torch import Tensor

from furiosa_build.backends.graph import Graph
from furiosa_build.backends.inductor import InductorBackend
from furiosa_build.backends.native.build_library import build_library
from furiosa_build.backends.native.device import NativeDevice
from furiosa_build.backends.native.emit import make_plan
from furiosa_build.backends.native.encode import encode
from furiosa_build.backends.native.library import Library, Pool
from furiosa_build.backends.native.packing import NativePacker, packed_layout
from furiosa_build.backends.native.plan import Call, Plan
from furiosa_build.ir.segment import Segment
from furiosa_build.ir.tensors import Layout
from furiosa_build.models.tracing import BucketShape, Tracer

Run = Callable[[], object]
COPIES = 8
"""Layers that runs go through, each with parameters of its own: more than caches hold."""


def main(schemes: list[str], buckets: list[BucketShape], threads: int, inductor: bool) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        build_library(work / "kernels.so", Path(tempfile.gettempdir()) / "furiosa-build-benchmark-objects")
        library = Library(work / "kernels.so")
        pool = library.pool(threads)
        for scheme in schemes:
            quantized = {f"model.layers.0.{name}.weight": scheme for name in LINEARS if scheme != "none"}
            tracer = Tracer(CONFIG, quantized)  # type: ignore[arg-type]
            for shape in buckets:
                graph = tracer.trace(shape, Segment(layers=(0,))).whole
                inputs = make_inputs(graph, shape)
                runs = native_runs(library, pool, graph, inputs, scheme)
                if inductor:
                    runs["inductor"] = [inductor_run(graph, inputs, work / f"{scheme}{len(list(work.iterdir()))}.so")]
                print(f"{scheme} {shape.batch}x{shape.query}x{shape.context}, {threads} threads")
                report(runs, time.thread_time if threads == 1 else time.perf_counter, 24 if shape.query == 1 else 6)


def native_runs(
    library: Library, pool: Pool, graph: Graph, inputs: Sequence[Tensor], scheme: str
) -> dict[str, list[Run]]:
    """The whole plan, and each of its calls: for every copy of the parameters."""
    plan = make_plan(graph)
    tensors, _ = encode(plan)
    outputs = [torch.empty([n or 0 for n in s.shape], dtype=getattr(torch, s.dtype)) for s in plan.outputs]
    rest = [*outputs, aligned(plan.constants_blob), aligned(bytes(plan.arena))]
    runs: dict[str, list[Run]] = defaultdict(list)
    for _ in range(COPIES):
        given = [
            parameter(t, s, scheme) if s.role == "parameter" else t for t, s in zip(inputs, graph.inputs, strict=True)
        ]
        kept = [*given, *rest]
        addresses = [tensor.data_ptr() for tensor in kept]
        for name, calls in [("whole", plan.calls), *((describe(plan, call), [call]) for call in plan.calls)]:
            _, code = encode(plan.model_copy(update={"calls": calls}))
            program = library.program(tensors, code, len(addresses), 0)  # the arena is given
            runs[name].append(lambda program=program, addresses=addresses, _kept=kept: program.run(pool, addresses))  # type: ignore[misc]
    return runs


def parameter(tensor: Tensor, spec: object, scheme: str) -> Tensor:
    """As the library takes it."""
    stored = Layout(spec.dtype, tuple(spec.shape))  # type: ignore[attr-defined]
    if packed_layout(stored) != stored:
        tensor = NativePacker().pack(scheme, spec.name.rsplit(".", 1)[-1], tensor)  # type: ignore[attr-defined]
    device = NativeDevice()
    return device.to_torch(device.parameter(device.from_torch(tensor.clone()), spec))  # type: ignore[arg-type]


def aligned(blob: bytes) -> Tensor:
    memory = torch.zeros(len(blob) + 64, dtype=torch.uint8)
    begin = -memory.data_ptr() % 64
    if blob:
        memory[begin : begin + len(blob)] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
    return memory[begin:]


def describe(plan: Plan, call: Call) -> str:
    shapes = ["x".join(map(str, view.shape)) for view in plan.operands(call) if view is not None]
    return f"{call.op} {' '.join(dict.fromkeys(shapes))}"


def inductor_run(graph: Graph, inputs: Sequence[Tensor], output: Path) -> Run:
    backend = InductorBackend()
    backend.compile(graph, output, backend.isa("native"), output.parent / "scratch")
    program = backend.load(output)
    return lambda: program.run(inputs)


def report(runs: dict[str, list[Run]], clock: Callable[[], float], rounds: int) -> None:
    times: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, each in runs.items():
            copies = 1 if name in ("whole", "inductor") else len(each) // COPIES
            first = number % (len(each) // copies)
            chosen = each[first * copies : (first + 1) * copies]
            begin = clock()
            for run in chosen:
                run()
            if number > 0:
                times[name].append(clock() - begin)
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"  {median:9.3f}  {100 * median / medians['whole']:5.1f} %  {name}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schemes", nargs="?", default="none,int8,fp8")
    parser.add_argument("buckets", nargs="?", default="1x1x1024,8x1x1024,1x512x512")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--inductor", action="store_true")
    given = parser.parse_args()
    shapes = [BucketShape(*map(int, text.split("x"))) for text in given.buckets.split(",")]
    main(given.schemes.split(","), shapes, given.threads, given.inductor)
