"""What a worker finds of a model once for an architecture: its outline, and that the backend can compile its graphs."""

from __future__ import annotations

from furiosa_build.build.models import OpenModel
from furiosa_build.build.planning_jobs import PlanningJobs
from furiosa_build.ir.loading import Loading
from furiosa_build.ir.outline import Outline
from furiosa_build.steps.graph_check import GraphCheck, GraphCheckRequest
from furiosa_build.steps.survey import OUTPUT, Survey, SurveyRequest


def outline_of(model: OpenModel, loading: Loading, jobs: PlanningJobs) -> Outline:
    """The outline of a model. Raises UserError for an architecture that is not supported."""
    request = SurveyRequest(hf_config=loading.hf_config)
    record = jobs.run(Survey(), model.backend, {"hf_config": loading.hf_config}, request)
    return Outline.model_validate(jobs.store.read_json(record, OUTPUT))


def check_graphs(model: OpenModel, loading: Loading, outline: Outline, jobs: PlanningJobs) -> None:
    """Raises UserError for a model whose graphs the backend cannot compile."""
    if model.backend.checks_graphs:
        layers = [kind.layers[0] for kind in outline.blocks]
        request = GraphCheckRequest(
            hf_config=loading.hf_config,
            layers=layers,
            backend=model.spec.backend.name,
            kv_cache_dtype=model.spec.buckets.kv_cache_dtype,
        )
        jobs.run(GraphCheck(), model.backend, request.model_dump(exclude={"inputs"}), request)
