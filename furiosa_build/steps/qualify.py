"""qualify: does the artifact say what the model says? Only then does `latest` point to it.

The artifact answers in a fresh process with the runtime alone. What it answers is compared, in another process, with
what a user of transformers gets from the source: tokens, texts, rendered conversations, logits. Only the weights are
rounded as the artifact's are; what that costs is measured against the model as it was published.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from furiosa_build.artifact.schema import MANIFEST_FILE, TIMESTAMP_FILE, Manifest, Timestamp, to_json
from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.core.errors import StepError
from furiosa_build.core.files import link_or_copy
from furiosa_build.core.progress import current
from furiosa_build.ir.qualification_limits import QualificationLimits
from furiosa_build.steps.base import BuildState, Entry, Inputs, Likeness, Step, Work
from furiosa_build.steps.qualification.child import Child
from furiosa_build.steps.weights import (
    CHECKPOINT,
    WeightsRequest,
    parameters_of,
    scheme_of,
    size_of,
    weights_request,
)
from furiosa_build.weights.listing import MODEL_FILES, ORIGINAL, ModelFiles, Original

if TYPE_CHECKING:
    from furiosa_build.plan.budget.costs import Costs
    from furiosa_build.plan.budget.durations import KnownStep
    from furiosa_build.plan.planner import PlannedStep, Site
    from furiosa_build.recipe.schema import BuildSpec

OUTPUT = "qualification.json"
ARTIFACT = "artifact/"
WEIGHTS = "weights/"
SOURCE = "source/"
"""What the names of the inputs begin with: the artifact's files, the checkpoint's, and those of the source."""
TEXTS = "texts"


class QualifyRequest(WeightsRequest):
    """An artifact to be judged.

    Attributes:
        changes_config: The recipe says itself what the model's config is, or takes some of its layers only.
        hub_name: What the model is called on the hub, if it is there.
        has_tokenizer: False: the recipe wants no tokenizer.
        limits: How far it may be from the model.
    """

    changes_config: bool
    hub_name: str | None
    has_tokenizer: bool
    limits: QualificationLimits


class Case(BaseModel):
    """An artifact to be judged, as the process that judges it finds it.

    Attributes:
        request: What is to be judged.
        source: All files of the model's source, by name.
        weights: The files of the weights that the artifact was made of, by name.
        text: A text to measure a quantized model on; None: the usual one.
        work: A directory for files of this work.
        counted: The file in which progress is counted; None: it is not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    request: QualifyRequest
    source: dict[str, Path]
    weights: dict[str, Path]
    text: Path | None
    work: Path
    counted: Path | None = None

    @property
    def artifact(self) -> Path:
        """Its directory."""
        return self.work / "artifact"


class Verdict(BaseModel):
    """The figures of an artifact that qualifies; else None, and why it does not."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    figures: dict[str, Any] | None = None
    refusal: str = ""


class Qualify(Step[QualifyRequest]):
    """Writes qualification.json. Raises StepError when the artifact does not run, or says something else."""

    name = label = "qualify"
    Request = QualifyRequest
    scope = "artifact"
    alone = True
    packages = ("torch", "transformers", "numpy", "tokenizers")
    modules = ("furiosa_build.steps.qualification.process", "furiosa_build.runtime.probe")
    backend_code = uses_schemes = True

    def plan(self, site: Site) -> Entry:
        model, written = site.model, site.model.writes_checkpoint
        # The artifact's id, which artifact.json has, stands for all files but provenance.json.
        needs = {"package": "artifact.json", site.name_of("fetch"): "*"}
        return Entry(
            self.name,
            "load the artifact in a fresh process, generate, compare with transformers",
            needs=needs | ({site.maker("checkpoint"): CHECKPOINT} if written else {}),
            reads={
                "schemes": dict(model.schemes),
                "parameters": parameters_of(model),
                "hf_config": dict(model.hf_config),
                "changes_config": _changes_config(model.spec),
                "has_tokenizer": _has_tokenizer(model.spec),
                "limits": _limits(model.spec).model_dump(),
            },
        )

    def request(self, step: PlannedStep, state: BuildState) -> QualifyRequest:
        weights, fetched = weights_request(step, state), step.site.name_of("fetch")
        original = Original.model_validate(state.json(fetched, ORIGINAL))
        manifest = Manifest.model_validate(state.json("package", MANIFEST_FILE))
        inputs = {f"{WEIGHTS}{name}": sha256 for name, sha256 in weights.inputs.items()}
        inputs |= {f"{SOURCE}{name}": file.sha256 for name, file in original.files.items()}
        inputs |= {f"{ARTIFACT}{name}": file.sha256 for name, file in manifest.files.items()}
        inputs[f"{ARTIFACT}{MANIFEST_FILE}"] = state.files("package")[MANIFEST_FILE].sha256
        if original.texts is not None:
            inputs[TEXTS] = original.texts.sha256
        of_hub = ModelFiles.model_validate(state.json(fetched, MODEL_FILES)).revision is not None
        spec = step.model.spec
        return QualifyRequest(
            **{**dict(weights), "inputs": inputs},
            changes_config=_changes_config(spec),
            hub_name=spec.model.model_id_or_path if of_hub else None,
            has_tokenizer=_has_tokenizer(spec),
            limits=_limits(spec),
        )

    def work(self, step: PlannedStep, costs: Costs) -> Work:
        sizes = costs.of(step)
        return Work(costs.files + (sizes.files if step.model.schemes else sizes.weights))

    def held(self, step: PlannedStep, costs: Costs) -> int:
        sizes = costs.of(step)
        return sizes.judge + max(sizes.probe, sizes.reference)

    def likeness(self, step: KnownStep) -> Likeness:
        artifact, schemes = step.needs["package"], scheme_of(step.reads)
        drawn = step.is_drawn and schemes == "none"
        return Likeness((artifact["backend"]["name"], schemes, drawn), size_of(artifact["outline"]["parameters"]))

    def run(self, request: QualifyRequest, inputs: Inputs, output: Path) -> None:
        with tempfile.TemporaryDirectory(dir=output) as directory:
            meter = current()
            case = Case(
                request=request,
                source=inputs.under(SOURCE),
                weights=inputs.under(WEIGHTS),
                text=inputs.files.get(TEXTS),
                work=Path(directory),
                counted=None if meter is None else meter.path,
            )
            assemble(inputs.under(ARTIFACT), case.artifact)
            verdict = judged(case)
        if verdict.figures is None:
            raise StepError("qualify", verdict.refusal)
        (output / OUTPUT).write_bytes(canonical_json(verdict.figures))


def _changes_config(spec: BuildSpec) -> bool:
    return spec.model.architecture is not None or spec.model.num_hidden_layers is not None


def _has_tokenizer(spec: BuildSpec) -> bool:
    return spec.model.tokenizer != "none"


def _limits(spec: BuildSpec) -> QualificationLimits:
    return QualificationLimits(**spec.qualify.model_dump(exclude={"texts"}))


def assemble(files: Mapping[str, Path], artifact: Path) -> None:
    """Makes an artifact's directory of its files."""
    for name, path in files.items():
        link_or_copy(path, artifact / name)
    manifest = Manifest.model_validate_json(files[MANIFEST_FILE].read_bytes())
    (artifact / TIMESTAMP_FILE).write_bytes(to_json(Timestamp.of(manifest.artifact_id, 0)))


def judged(case: Case) -> Verdict:
    """Judges an artifact in a process of its own, that of transformers. Raises StepError if that fails."""
    asked, verdict = case.work / "case.json", case.work / "verdict.json"
    asked.write_text(case.model_dump_json())
    with Child("the reference", "furiosa_build.steps.qualification.process", str(asked), str(verdict)) as child:
        child.finish()
    return Verdict.model_validate_json(verdict.read_bytes())
