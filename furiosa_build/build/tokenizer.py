"""The tokenizer of an artifact, before there is a plan: a worker makes it once of the files that the model has."""

from __future__ import annotations

from typing import Any

from furiosa_build.build.files import Files
from furiosa_build.build.models import OpenModel
from furiosa_build.build.planning_jobs import PlanningJobs
from furiosa_build.core.errors import UserError
from furiosa_build.ir.tokenizer import TokenizerOutline
from furiosa_build.plan.resolved import pretrained_id
from furiosa_build.steps.tokenizer import FILES, OUTLINE, Tokenizer, TokenizerRequest
from furiosa_build.store import ActionRecord

_CONFIG = ("model_type", "model_name", "tokenizer_class", "transformers_version")
"""The fields of config.json by which transformers chooses how to read a tokenizer's files."""


def tokenizer_of(model: OpenModel, vocab_size: int, files: Files, jobs: PlanningJobs) -> TokenizerOutline | None:
    """The tokenizer for a model's artifact; None: the model has none, or the recipe wants none.

    One that cannot be fetched from the hub is unknown. Raises UserError for one that cannot be used.
    """
    if model.spec.model.tokenizer == "none":
        return None
    reads = {"config": _config(model), "vocab_size": vocab_size}
    try:
        inputs = {"source": model.sources.tokenizer_identity()}
        record = jobs.find(Tokenizer(), model.backend, reads, inputs)
        found = {} if record is not None else files.read_source(model.sources.tokenizer_files())
    except UserError as error:
        if not model.sources.is_on_hub:
            raise
        return TokenizerOutline(unknown=str(error))
    if record is None:
        if not found:
            return None
        request = TokenizerRequest(inputs=found, name=pretrained_id(model.spec.model), **reads)
        record = jobs.run(Tokenizer(), model.backend, reads, request, inputs)
    outline = TokenizerOutline.model_validate(jobs.store.read_json(record, OUTLINE))
    return outline.model_copy(update={"files": _files(record)})


def _config(model: OpenModel) -> dict[str, Any]:
    fields = {key: model.sources.config[key] for key in _CONFIG if key in model.sources.config}
    if model.sources.is_on_hub:
        fields["_name_or_path"] = model.spec.model.model_id_or_path
    return fields


def _files(record: ActionRecord) -> dict[str, str]:
    made = record.outputs.items()
    return {path.removeprefix(FILES): output.sha256 for path, output in made if path.startswith(FILES)}
