"""The jobs that run before there is a plan: a worker finds what a plan is made of, once for what the job reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from furiosa_build.backends.base import Backend
from furiosa_build.build.executors.base import Executor
from furiosa_build.build.factors import Factors
from furiosa_build.core.events import Emitter, SurveyStarted
from furiosa_build.plan.keys import key_of
from furiosa_build.steps.base import Job, Request
from furiosa_build.store import ActionRecord, Store


@dataclass
class PlanningJobs:
    """Runs such jobs.

    Attributes:
        store: Where what they find is kept.
        executors: What runs them, by what jobs call their `worker`.
        told: Whether an event has told that planning takes time.
    """

    store: Store
    factors: Factors
    executors: Mapping[str, Executor]
    events: Emitter
    told: bool = False

    def find(
        self, job: Job[Any], backend: Backend, reads: Mapping[str, Any], inputs: Mapping[str, Mapping[str, str]]
    ) -> ActionRecord | None:
        """What the job has found before, if it has. `reads` and `inputs` are what its key is made of."""
        return self.store.find(key_of(self.factors.of(job, backend, reads, inputs)))

    def run(
        self,
        job: Job[Any],
        backend: Backend,
        reads: Mapping[str, Any],
        request: Request,
        inputs: Mapping[str, Mapping[str, str]] | None = None,
    ) -> ActionRecord:
        """What the job finds, now or before. Raises UserError as the job does."""
        of_key = self.factors.of(job, backend, reads, inputs or {})
        key = key_of(of_key)
        if (found := self.store.find(key)) is not None:
            return found
        if not self.told:
            self.events.emit(SurveyStarted())
            self.told = True
        log = self.store.log_path(job.name)
        return self.store.get_or_run(
            key, job.name, of_key, lambda output: self.executors[job.worker].run(job.name, job, request, output, log)
        ).record
