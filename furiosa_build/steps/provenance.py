"""provenance.json: what the artifact was made of, and by what: an in-toto Statement v1, SLSA provenance v1.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.1/provenance
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import furiosa_build
from furiosa_build.artifact.schema import DRAFT_DIRECTORY, FileRecord
from furiosa_build.core.canonical_json import digest
from furiosa_build.plan.model import ModelPlan
from furiosa_build.plan.resolved import resolved_recipe
from furiosa_build.weights.listing import ListedWeights, ModelFiles

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:furiosa-build:recipe:v1"
BUILDER = "urn:furiosa-build"


def provenance(
    models: Sequence[tuple[ModelPlan, ListedWeights, ModelFiles]],
    subjects: Mapping[str, FileRecord],
    tools: Mapping[str, str],
) -> dict[str, Any]:
    """The statement. No path of this machine, no user and no time is in it.

    Args:
        models: The model, and its draft if it has one. Of each the model, the source of the parameters, and the source
            of the tokenizer and such with the commit of a model on the hub.
        subjects: The artifact's files.
        tools: Names and versions of what made the artifact.
    """
    recipes = [{"recipe": resolved_recipe(model.spec)} for model, *_ in models]
    internals = [{"isa": model.isa, "hf_config": dict(model.hf_config)} for model, *_ in models]
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": record.sha256}} for name, record in sorted(subjects.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": _with_draft(recipes),
                "internalParameters": _with_draft(internals),
                "resolvedDependencies": [
                    found
                    for model, directory in zip(models, ("", DRAFT_DIRECTORY), strict=False)
                    for found in _dependencies(*model, directory)
                ],
            },
            "runDetails": {
                "builder": {
                    "id": BUILDER,
                    "version": dict(tools),
                    "builderDependencies": [
                        {"name": "source of furiosa_build", "digest": {"sha256": project_digest()}}
                    ],
                },
            },
        },
    }


def _with_draft(of_models: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is said of the model; what is said of its draft, under `draft`."""
    own, *of_draft = of_models
    return own | ({"draft": of_draft[0]} if of_draft else {})


def project_digest() -> str:
    """sha256 over all of this project's own source files."""
    root = Path(furiosa_build.__file__).parent
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.py")}
    return digest({name: hashlib.sha256(content).hexdigest() for name, content in files.items()})


def _dependencies(model: ModelPlan, weights: ListedWeights, others: ModelFiles, directory: str) -> list[dict[str, Any]]:
    """`directory`: what tells the draft's files from those of the model."""
    files = {**weights.files, **others.files}
    found: list[dict[str, Any]] = [
        {"name": f"{directory}{name}", "digest": {"sha256": file.sha256}} for name, file in sorted(files.items())
    ]
    if others.revision is not None:
        name = model.pretrained_id
        found.insert(
            0,
            {
                "name": name,
                "uri": f"pkg:huggingface/{name}@{others.revision}",
                "digest": {"gitCommit": others.revision},
            },
        )
    if weights.seed is not None:
        found.append({"name": f"{directory}random weights", "annotations": {"seed": weights.seed}})
    return found
