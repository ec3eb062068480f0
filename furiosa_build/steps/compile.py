"""compile:BUCKET:KIND: graphs become programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.backends.base import Option
from furiosa_build.backends.registry import get_backend
from furiosa_build.steps.base import BuildState, Entry, Inputs, Likeness, Request, Step, Work

if TYPE_CHECKING:
    from furiosa_build.backends.graph import Graph
    from furiosa_build.plan.budget.costs import Costs
    from furiosa_build.plan.budget.durations import KnownStep
    from furiosa_build.plan.planner import PlannedStep, Site

GRAPHS = "graphs.json"
CONSTANTS = "constants/"
"""What the names of parameter files begin with."""


class CompileRequest(Request):
    """Graphs to be compiled: the input `graphs.json`, and those under `constants/`.

    Attributes:
        backend: The backend's name.
        isa: The instruction set.
        options: Options of the backend's compiler.
        core_aten: The programs call operators of core ATen only.
        layer_prefixes: What the names of each layer's parameters begin with, where the programs are to hold their
            parameters as constants. None: they are not.
    """

    backend: str
    isa: str
    options: dict[str, Option]
    core_aten: bool = False
    layer_prefixes: list[str] | None = None


class Compile(Step[CompileRequest]):
    """Writes the programs of the graphs, in order, where the backend locates them."""

    name = label = "compile"
    Request = CompileRequest
    scope = "program"
    worker = "compiler"
    backend_tools = backend_code = uses_schemes = True
    product = "programs"

    def plan(self, site: Site) -> Entry:
        spec, isa, (bucket, kind) = site.model.spec, site.model.isa, site.program
        needs = {site.name_of(f"partition:{bucket.name}:{kind.name}"): "*"}
        reads: dict[str, Any] = {"backend": spec.backend.name, "isa": isa}
        if spec.backend.compiler_config_overrides:
            reads["options"] = spec.backend.compiler_config_overrides
        if spec.rewriting.do_decompositions_for_model_rewrite:
            reads["core_aten"] = True
        if spec.rewriting.embed_all_constants_into_graph:
            [use] = kind.uses
            needs[site.name_of("partition:weights")] = f"stage-{use.stage}-*"
            reads["constants_of"] = use.layers
        text = f"compile {site.program_text} with {spec.backend.name} for {isa}"
        return Entry(f"compile:{bucket.name}:{kind.name}", text, needs, reads)

    def request(self, step: PlannedStep, state: BuildState) -> CompileRequest:
        model, (_, kind) = step.model, step.site.program
        graphs, *weights = step.needs
        inputs, prefixes = {GRAPHS: state.files(graphs)[GRAPHS].sha256}, None
        for needed in weights:
            files = state.files(needed).items()
            of_stage = {name: file.sha256 for name, file in files if fnmatchcase(name, step.needs[needed])}
            inputs |= {f"{CONSTANTS}{name}": sha256 for name, sha256 in of_stage.items()}
            prefixes = [f"{model.outline.layer_prefix}{layer}." for layer in kind.segment.layers]
        return CompileRequest(
            inputs=inputs,
            backend=model.spec.backend.name,
            isa=model.isa,
            options=dict(model.spec.backend.compiler_config_overrides),
            core_aten=model.spec.rewriting.do_decompositions_for_model_rewrite,
            layer_prefixes=prefixes,
        )

    def work(self, step: PlannedStep, costs: Costs) -> Work:
        sizes = costs.of(step)
        return Work(sizes.graph + sizes.constants(step), sizes.programs(step))

    def scratch(self, step: PlannedStep, costs: Costs) -> int:
        return costs.of(step).scratch

    def worker_memory(self, step: PlannedStep, costs: Costs) -> int:
        return costs.of(step).compile_worker(step)

    def likeness(self, step: KnownStep) -> Likeness:
        return Likeness((step.reads["backend"], step.role))

    def run(self, request: CompileRequest, inputs: Inputs, output: Path) -> None:
        from furiosa_build.models.partition import CutGraph

        backend, constants = get_backend(request.backend), inputs.under(CONSTANTS).values()
        graphs = CutGraph.model_validate_json(inputs.files[GRAPHS].read_bytes()).graphs
        if request.layer_prefixes is not None:
            graphs = [_embed(graph, constants, request.layer_prefixes) for graph in graphs]
        backend.compile_all(graphs, output, request.isa, inputs.scratch, request.options, request.core_aten)


def _embed(graph: Graph, files: Iterable[Path], prefixes: Sequence[str]) -> Graph:
    import torch
    from safetensors import safe_open

    wanted = {
        position: spec.name if spec.block is None else prefixes[spec.block] + spec.name
        for position, spec in enumerate(graph.inputs)
        if spec.role == "parameter"
    }
    values = {}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            held = set(stored.keys())
            for position, name in wanted.items():
                if name in held:
                    values[position] = stored.get_tensor(name).view(getattr(torch, graph.inputs[position].dtype))
    return graph.embed(values)
