"""The outlines of models, which plans are made from: once for an architecture a worker surveys the model."""

from __future__ import annotations

from furiosa_build.build.executors.base import Executor
from furiosa_build.build.factors import Factors
from furiosa_build.build.models import OpenModel
from furiosa_build.core.events import Emitter, SurveyStarted
from furiosa_build.ir.loading import Loading
from furiosa_build.ir.outline import Outline
from furiosa_build.plan.keys import key_of
from furiosa_build.steps.survey import OUTPUT, Survey, SurveyRequest
from furiosa_build.store import Store


def outline_of(
    model: OpenModel, loading: Loading, store: Store, factors: Factors, executor: Executor, events: Emitter
) -> Outline:
    """The outline of a model. An event tells that it takes time to find."""
    job, request = Survey(), SurveyRequest(hf_config=loading.hf_config)
    of_key = factors.of(job, model.backend, {"hf_config": loading.hf_config}, {})
    record = store.find(key_of(of_key))
    if record is None:
        events.emit(SurveyStarted())
        log = store.log_path(job.name)
        record, _ = store.get_or_run(
            key_of(of_key),
            job.name,
            of_key,
            lambda output: executor.run(job.name, job, request, output, log),
        )
    return Outline.model_validate(store.read_json(record, OUTPUT))
