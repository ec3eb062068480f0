"""How a build finds its plan: a worker learns what each model is, once for what it reads, and the steps follow."""

from __future__ import annotations

from dataclasses import replace

from furiosa_build.build.files import Files
from furiosa_build.build.loading import check_loading, loading_of, unused_note
from furiosa_build.build.mistakes import errors_of, failing
from furiosa_build.build.models import OpenModel, check_draft
from furiosa_build.build.planning_jobs import PlanningJobs
from furiosa_build.build.survey import check_graphs, outline_of
from furiosa_build.build.tokenizer import tokenizer_of
from furiosa_build.core.errors import UserError
from furiosa_build.ir.loading import Loading
from furiosa_build.plan.model import ModelPlan
from furiosa_build.plan.planner import Plan, make_plan
from furiosa_build.steps.registry import STEPS


class Planning:
    """Finds the plan of a build.

    Args:
        models: The models, by id. Their specs come to fit them.
        files: The files of the build.
        jobs: What asks transformers, in a worker.
    """

    def __init__(self, models: dict[str, OpenModel], files: Files, jobs: PlanningJobs) -> None:
        self._models, self._files, self._jobs = models, files, jobs
        self._loadings: dict[str, Loading] = {}

    def plan(self) -> Plan:
        """The steps. Raises UserError for a model that cannot be built."""
        planned: dict[str, ModelPlan] = {}
        for model_id, model in self._models.items():
            with failing("survey"), errors_of(model_id, model.spec.name):
                length = planned[""].spec.buckets.max_seq_len_to_capture if model_id else None
                planned[model_id] = self._survey(model_id, model, length)
        check_draft(planned)
        # A draft model needs no tokenizer: it has the same vocabulary.
        with failing("tokenizer"):
            tokenizer = tokenizer_of(self._models[""], planned[""].outline.vocab_size, self._files, self._jobs)
        planned[""] = replace(planned[""], tokenizer=tokenizer)
        return make_plan(planned, STEPS)

    def check_loading(self, model_id: str) -> None:
        """Raises UserError when the weights, which the plan may not have seen, are not what it took them for."""
        model = self._models[model_id]
        if loading_of(model, self._jobs) != self._loadings[model_id]:
            raise UserError(
                "the weights, which are on this machine now, are stored in another form than could be known before",
                where=model.sources.described,
                hint="build again: what they are is known now, and what has been done is kept",
            )

    def _survey(self, model_id: str, model: OpenModel, length: int | None) -> ModelPlan:
        loading = self._loadings[model_id] = loading_of(model, self._jobs)
        model = self._models[model_id] = model.fitted(loading, length)
        outline = outline_of(model, loading, self._jobs)
        check_loading(loading, outline, model.sources)
        check_graphs(model, loading, outline, self._jobs)
        if note := unused_note(loading):
            self._jobs.events.note(note)
        return model.plan(loading, outline)
