"""How the weights of a build's models are loaded: found by transformers in a worker, once for a config and a header."""

from __future__ import annotations

from typing import Any

from furiosa_build.build.models import OpenModel
from furiosa_build.build.planning_jobs import PlanningJobs
from furiosa_build.core.canonical_json import digest
from furiosa_build.core.errors import UserError
from furiosa_build.ir.loading import Loading
from furiosa_build.ir.outline import Outline
from furiosa_build.steps.loading import OUTPUT, FindLoading, LoadingRequest
from furiosa_build.weights.checkpoint import lacking
from furiosa_build.weights.sources import Sources


def loading_of(model: OpenModel, jobs: PlanningJobs) -> Loading:
    """How the weights of a model are loaded. Raises UserError when transformers refuses its config.json."""
    request = _request(model)
    record = jobs.run(FindLoading(), model.backend, _reads(request), request)
    loading = Loading.model_validate(jobs.store.read_json(record, OUTPUT))
    if any(not model.sources.same_values(*copy) for copy in loading.copies):
        # As transformers: what the files say goes before what the config says.
        untied = {**loading.hf_config, "tie_word_embeddings": False}
        return loading.model_copy(update={"hf_config": untied})
    return loading


def _request(model: OpenModel) -> LoadingRequest:
    header, checkpoint = model.sources.header(), model.checkpoint
    return LoadingRequest(
        config=model.sources.config,
        layers=model.spec.model.num_hidden_layers,
        stored=None
        if header is None
        else {name: (layout.dtype, list(layout.shape)) for name, layout in header.layouts.items()},
        stored_dtype=None if header is None else header.dtype,
        quantized=None if checkpoint is None else (dict(checkpoint.targets), list(checkpoint.ignore)),
    )


def _reads(request: LoadingRequest) -> dict[str, Any]:
    """What the key is made of: of what is stored, which may be tens of thousands of tensors, a digest."""
    reads = request.model_dump(exclude={"inputs"})
    return {**reads, "stored": digest(reads["stored"])}


def check_loading(loading: Loading, outline: Outline, sources: Sources) -> None:
    """Raises UserError when the checkpoint lacks a parameter that is built, or has it in another shape."""
    where = sources.described
    if missing := [name for name in loading.missing if name in outline.parameters]:
        raise lacking(missing, len(outline.parameters), where, loading.unused)
    for name, stored, expected in loading.misshapen:
        if name in outline.parameters:
            raise UserError(f"parameter {name} has shape {stored}, the architecture asks for {expected}", where=where)


def unused_note(loading: Loading) -> str:
    """What a person should know of stored tensors that the model does not load; empty if there are none."""
    names = loading.unused
    some = ", ".join(names[:3]) + (f", ... ({len(names)} tensors)" if names[3:] else "")
    return f"the checkpoint has {some}, which the model does not load" if names else ""
