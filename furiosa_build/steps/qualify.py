"""qualify: does the artifact say what the model says? Only then does `latest` point to it.

The artifact answers in a fresh process with the runtime alone. What it answers is compared with what a user of
transformers gets from the source: tokens, texts, rendered conversations, logits. Only the weights are rounded as the
artifact's are; what that costs is measured against the model as it was published.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_build.artifact.schema import MANIFEST_FILE, TIMESTAMP_FILE, Manifest, Timestamp, to_json
from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.core.errors import StepError
from furiosa_build.core.files import link_or_copy
from furiosa_build.ir.qualification_limits import QualificationLimits
from furiosa_build.steps.base import BuildState, Entry, Inputs, Likeness, Step, Work
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
    from furiosa_build.runtime.probe import Questions

OUTPUT = "qualification.json"
QUESTIONS = "questions.json"
ANSWERS = "answers.safetensors"
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


class Qualify(Step[QualifyRequest]):
    """Writes qualification.json. Raises StepError when the artifact does not run, or says something else."""

    name = label = "qualify"
    Request = QualifyRequest
    scope = "artifact"
    alone = True
    packages = ("torch", "transformers", "numpy", "tokenizers")
    modules = ("furiosa_build.runtime.probe",)
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
        return max(sizes.probe, sizes.reference)

    def likeness(self, step: KnownStep) -> Likeness:
        artifact, schemes = step.needs["package"], scheme_of(step.reads)
        drawn = step.is_drawn and schemes == "none"
        return Likeness((artifact["backend"]["name"], schemes, drawn), size_of(artifact["outline"]["parameters"]))

    def run(self, request: QualifyRequest, inputs: Inputs, output: Path) -> None:
        from furiosa_build.steps.qualification.judge import Judge

        with tempfile.TemporaryDirectory(dir=output) as directory:
            work = Path(directory)
            artifact = work / "artifact"
            assemble(inputs.under(ARTIFACT), artifact)
            judge = Judge(request, inputs.under(SOURCE), inputs.under(WEIGHTS), inputs.files.get(TEXTS), work)
            figures = judge.judge(artifact, lambda questions: answer(artifact, questions, work))
        (output / OUTPUT).write_bytes(canonical_json(figures))


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


def answer(artifact: Path, questions: Questions, work: Path) -> Path:
    """Asks the artifact, in a fresh process; returns the file of its answers. Raises StepError if it does not run."""
    asked, answers = work / QUESTIONS, work / ANSWERS
    asked.write_text(questions.model_dump_json())
    command = [sys.executable, "-m", "furiosa_build.runtime.probe", str(artifact), str(asked), str(answers)]
    ran = subprocess.run(command, check=False, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(ran.stderr)  # the step's log
    if ran.returncode != 0:
        raise StepError("qualify", f"the artifact does not run: {_reason(ran.stderr, ran.returncode)}")
    return answers


def _reason(complaints: str, status: int) -> str:
    """What a process said at its end, or by what it was ended."""
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    lines = [line for line in complaints.splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        lines = lines[-1:]
    return "\n".join(lines) or f"exit status {status}, and not a word"
