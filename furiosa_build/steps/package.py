"""package: the artifact's description and manifest, from what the other steps made. It has no parameters or programs:
these are already in the store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from furiosa_build.artifact.schema import ARTIFACT_FILE, MANIFEST_FILE, PROVENANCE_FILE, FileRecord, to_json
from furiosa_build.backends.registry import get_backend
from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.ir.outline import Outline
from furiosa_build.plan.kinds import Kind
from furiosa_build.plan.model import DRAFT, Bucket, ModelPlan, step_name
from furiosa_build.plan.resolved import portable_spec, resolved_recipe
from furiosa_build.recipe.schema import BuildSpec
from furiosa_build.steps.base import BuildState, Entry, Inputs, Request, Step, Work
from furiosa_build.weights.hf_layout import TRAVELLING
from furiosa_build.weights.listing import MODEL_FILES, WEIGHTS, ListedWeights, ModelFiles

if TYPE_CHECKING:
    from furiosa_build.plan.budget.costs import Costs
    from furiosa_build.plan.planner import PlannedStep, Site
    from furiosa_build.steps.artifact_description import BuiltModel, BuiltProgram

MODEL = "model/"
GRAPHS = "graphs/"
"""What the names of the inputs begin with: the model's files, and the graphs of the programs."""


class ModelOutputs(BaseModel):
    """What the steps have made of one model.

    Attributes:
        spec: What was built, without paths of a machine.
        hf_config: The fields of its config.json.
        outline: The model's layers and parameters.
        isa: The instruction set of its programs.
        schemes: The scheme of each quantized parameter, by name.
        library: The library that its programs call, by the name of its file; empty where they need none.
        programs: For each `BUCKET:KIND` the files of its programs, by name. Their graphs are inputs.
        parameters: The parameter files, by name.
        weights: The source of its weights.
        others: The files that travel beside them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    spec: BuildSpec
    hf_config: dict[str, Any]
    outline: Outline
    isa: str
    schemes: dict[str, str]
    library: dict[str, FileRecord]
    programs: dict[str, dict[str, FileRecord]]
    parameters: dict[str, FileRecord]
    weights: ListedWeights
    others: ModelFiles


class PackageRequest(Request):
    """An artifact to be described.

    Attributes:
        models: The models, by id.
        kv_blocks: KV blocks of a layer.
        tools: Names and versions of what made the artifact.
    """

    models: dict[str, ModelOutputs]
    kv_blocks: int
    tools: dict[str, str]


class Package(Step[PackageRequest]):
    """Writes artifact.json, manifest.json and provenance.json, and model/: the config, and the tokenizer's files."""

    name = label = "package"
    Request = PackageRequest
    scope = "artifact"
    worker = "here"
    # All that had a hand in the artifact: provenance.json tells.
    packages = ("furiosa_build", "python", "torch", "transformers", "numpy", "safetensors")
    backend_tools = True
    product = "a copy for the artifact"
    kept = "output"

    def plan(self, site: Site) -> Entry:
        reads = _reads(site.model, site.kv_blocks)
        if DRAFT in site.models:
            reads["draft"] = _reads(site.models[DRAFT], site.kv_blocks)
        if site.model.tokenizer is not None:
            reads["tokenizer"] = site.model.tokenizer.files
        # A checkpoint is what parameters are made of; the artifact has none.
        needs = {name: "*" for name, step in site.before.items() if step.type.makes != "checkpoint"}
        return Entry(self.name, f"publish artifact {site.model.spec.name}", needs, reads)

    def request(self, step: PlannedStep, state: BuildState) -> PackageRequest:
        site = step.site
        models = {id: _outputs_of(site, id, state) for id in site.models}
        listed, tokenizer = models[""].others.files, site.model.tokenizer
        inputs = {f"{MODEL}{name}": listed[name].sha256 for name in TRAVELLING if name in listed}
        inputs |= {f"{MODEL}{name}": sha256 for name, sha256 in (tokenizer.files if tokenizer else {}).items()}
        for id, model in models.items():
            for program in model.programs:
                graphs = state.files(step_name(id, f"partition:{program}"))["graphs.json"]
                inputs[f"{GRAPHS}{id}:{program}"] = graphs.sha256
        return PackageRequest(
            inputs=inputs,
            models=models,
            kv_blocks=site.kv_blocks,
            tools=state.tools(step),
        )

    def run(self, request: PackageRequest, inputs: Inputs, output: Path) -> None:
        from furiosa_build.steps.artifact_description import file_record, package

        main = request.models[""]
        directory = output / MODEL
        directory.mkdir()
        (directory / "config.json").write_bytes(canonical_json(main.hf_config))
        for name, path in inputs.under(MODEL).items():
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, directory / name)
        files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        model_files = {path.relative_to(directory).as_posix(): file_record(path.read_bytes()) for path in files}
        built = {
            id: _built(model, request.kv_blocks, inputs.under(f"{GRAPHS}{id}:")) for id, model in request.models.items()
        }
        found = package(built[""], model_files, request.tools, built.get(DRAFT))
        (output / ARTIFACT_FILE).write_bytes(to_json(found.artifact))
        (output / PROVENANCE_FILE).write_bytes(to_json(found.provenance))
        (output / MANIFEST_FILE).write_bytes(to_json(found.manifest))

    def work(self, step: PlannedStep, costs: Costs) -> Work:
        return Work(costs.files, costs.files) if costs.is_copied else Work()


def _reads(model: ModelPlan, kv_blocks: int) -> dict[str, Any]:
    return {
        **resolved_recipe(model.spec),
        "kv_blocks": kv_blocks,
        "isa": model.isa,
        "hf_config": dict(model.hf_config),
        "outline": model.outline.model_dump(mode="json"),
    }


def _outputs_of(site: Site, model_id: str, state: BuildState) -> ModelOutputs:
    model = site.models[model_id]

    def files(own_name: str) -> dict[str, FileRecord]:
        found = state.files(step_name(model_id, own_name))
        return {name: FileRecord(size=file.size, sha256=file.sha256) for name, file in found.items()}

    fetched = step_name(model_id, "fetch")
    programs = [f"{bucket.name}:{kind.name}" for bucket, kinds in model.kinds.items() for kind in kinds]
    return ModelOutputs(
        spec=portable_spec(model.spec),
        hf_config=dict(model.hf_config),
        outline=model.outline,
        isa=model.isa,
        schemes=dict(model.schemes),
        library=files("kernels") if step_name(model_id, "kernels") in site.before else {},
        programs={program: files(f"compile:{program}") for program in programs},
        parameters={} if model.spec.rewriting.embed_all_constants_into_graph else files("partition:weights"),
        weights=ListedWeights.model_validate(state.json(fetched, WEIGHTS)),
        others=ModelFiles.model_validate(state.json(fetched, MODEL_FILES)),
    )


def _built(outputs: ModelOutputs, kv_blocks: int, graphs: Mapping[str, Path]) -> BuiltModel:
    from furiosa_build.steps.artifact_description import BuiltModel

    model = ModelPlan(outputs.spec, outputs.hf_config, outputs.outline, outputs.isa, outputs.schemes)
    programs = [
        program
        for bucket, kinds in model.kinds.items()
        for kind in kinds
        for program in _programs(outputs, bucket, kind, graphs[f"{bucket.name}:{kind.name}"])
    ]
    return BuiltModel(model, kv_blocks, outputs.library, programs, outputs.parameters, outputs.weights, outputs.others)


def _programs(outputs: ModelOutputs, bucket: Bucket, kind: Kind, graphs: Path) -> Iterator[BuiltProgram]:
    """The programs of a kind of supertask, each with the signature of its graph."""
    from furiosa_build.steps.artifact_description import BuiltProgram

    files, backend = outputs.programs[f"{bucket.name}:{kind.name}"], get_backend(outputs.spec.backend.name)
    cut = json.loads(graphs.read_bytes())
    for number, (graph, collectives) in enumerate(zip(cut["parts"], cut["collectives"], strict=True)):
        location = backend.locate(number)
        if outputs.spec.rewriting.embed_all_constants_into_graph:
            graph["inputs"] = [spec for spec in graph["inputs"] if spec["role"] != "parameter"]
        yield BuiltProgram(bucket, kind, number, location, files[location.file], graph, collectives)
