"""The outlines of models, which plans are made from: once for an architecture a worker surveys the model."""

from __future__ import annotations

from furiosa_build.build.models import OpenModel
from furiosa_build.build.planning_jobs import PlanningJobs
from furiosa_build.ir.loading import Loading
from furiosa_build.ir.outline import Outline
from furiosa_build.steps.survey import OUTPUT, Survey, SurveyRequest


def outline_of(model: OpenModel, loading: Loading, jobs: PlanningJobs) -> Outline:
    """The outline of a model. Raises UserError for an architecture that is not supported."""
    request = SurveyRequest(hf_config=loading.hf_config)
    record = jobs.run(Survey(), model.backend, {"hf_config": loading.hf_config}, request)
    return Outline.model_validate(jobs.store.read_json(record, OUTPUT))
