"""One build: the steps of a recipe, whether each is done, and how to run it.

The store's truth decides. A step's key is known once the outputs of the steps it needs are; a step is done when the
store holds the action of that key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_build.artifact import writer
from furiosa_build.build import admission
from furiosa_build.build.executors.local import local_executors
from furiosa_build.build.factors import Factors
from furiosa_build.build.files import Files
from furiosa_build.build.mistakes import errors_of, failing
from furiosa_build.build.models import open_models
from furiosa_build.build.planning import Planning
from furiosa_build.build.planning_jobs import PlanningJobs
from furiosa_build.build.publish import PUBLISHED, Publication
from furiosa_build.core.cancellation import CancellationToken, cancelled_by
from furiosa_build.core.events import Emitter, Listener
from furiosa_build.core.failpoints import doing
from furiosa_build.core.files import expand_user
from furiosa_build.core.progress import metered
from furiosa_build.core.system import Machine
from furiosa_build.plan.explain import Explanation, explain_step
from furiosa_build.plan.keys import key_of
from furiosa_build.plan.planner import Plan, PlannedStep
from furiosa_build.plan.source_code import SourceCode
from furiosa_build.recipe.compose import load_recipe
from furiosa_build.recipe.schema import Recipe
from furiosa_build.store import ActionRecord, ActionResult, Outcome, Store, default_store_root

if TYPE_CHECKING:
    from furiosa_build.build.estimates import Estimates
    from furiosa_build.plan.budget.preflight import Preflight


class Build:
    """The build of one recipe.

    Args:
        recipe: What to build and how.
        cwd: What a relative `save_dir` is relative to.
        listeners: Called with the events of this build.
    """

    def __init__(self, recipe: Recipe, cwd: Path | None = None, listeners: Iterable[Listener] = ()) -> None:
        self.events = Emitter(listeners)
        self.recipe, self.spec, self.options = recipe, recipe.spec, recipe.options
        self.cwd = cwd or Path.cwd()
        cache = self.options.cache_dir
        root = (expand_user(cache, "cache_dir") if cache else default_store_root()).absolute()
        self.store = Store(root, self.options.verify_inputs, self.directory.parent)
        self.store.notify = self.events.note
        self.models = open_models(recipe, self.store.hashes)
        self.outcomes: dict[str, Outcome] = {}
        self._cancellation = CancellationToken()
        self._factors = Factors(self.models, SourceCode(memo=root / "code.json"), self._find)
        self.files = Files(self.store, self.models, lambda: self.plan, self._factors, self._find)
        self.executors = local_executors(self.options, self.files.inputs)
        jobs = PlanningJobs(self.store, self._factors, self.executors, self.events)
        self._planning = Planning(self.models, self.files, jobs)
        writer.check_destination(self.directory)
        writer.check_is_directory(self.store.root, "cache_dir")

    @property
    def directory(self) -> Path:
        """SAVE_DIR/NAME: where the artifact's versions are."""
        return self.cwd / expand_user(self.options.save_dir, "save_dir") / self.spec.name

    @cached_property
    def plan(self) -> Plan:
        """The steps. The first time for an architecture a worker surveys the model, which takes seconds."""
        plan = self._planning.plan()
        self.spec = plan.model.spec
        return plan

    @cached_property
    def version_directory(self) -> Path:
        """Where the artifact is, once `package` is done; to be asked before the build is closed."""
        return self._publication.directory

    def is_done(self, name: str) -> bool:
        """Whether the step's output is in the store and, for `package` and `qualify`, in the output directory."""
        return self._find(name) is not None and (name not in PUBLISHED or self._publication.has(name))

    def run(self, name: str) -> Outcome:
        """Does the step unless the store has it, and what follows from it in the output directory.

        Raises UserError or StepError; what other steps have finished stays in the store.
        """
        step = self.plan.steps[name]
        mistakes = errors_of(step.model_id, step.model.spec.name)
        meter = metered(self.store.meter_path(name))
        with mistakes, failing(name), cancelled_by(self._cancellation), doing(name), meter:
            if self._find(name) is None:
                factors = self._factors.complete(self.plan, step)
                self.outcomes[name] = self.store.get_or_run(
                    key_of(factors), step.own_name, factors, lambda output: self._execute(step, output)
                )
                if step.type.reads_source:
                    self._planning.check_loading(step.model_id)
            if name == "package":
                self._publication.publish(outcome.record for outcome in self.outcomes.values())
            if name == "qualify":
                self._publication.accept(self.outcomes[name].record)
        return self.outcomes[name]

    def explain(self) -> Iterator[Explanation]:
        """Tells for each step whether it is up to date, or why not. Runs nothing."""
        for name in self.plan.steps:
            if self.is_done(name):
                yield Explanation(name, "up to date")
            elif self._find(name) is not None:
                yield Explanation(name, "to publish", self._publication.why_not(name))
            else:
                yield self._why_not_done(self.plan.steps[name])

    def preflight(self, steps: Iterable[str] | None = None, machine: Machine | None = None) -> Preflight:
        """What is to do of `steps` (None: of all) needs, and what cannot fit. `machine`: not this one."""
        undone = [name for name in (self.plan.steps if steps is None else steps) if not self.is_done(name)]
        certain = {name: self._why_not_done(self.plan.steps[name]).state == "to do" for name in undone}
        fetches = [step for step in self.plan.steps.values() if step.type.reads_source and self.is_done(step.name)]
        return self._estimates.preflight(certain, {step.model_id for step in fetches}, machine)

    def estimate_seconds(self, name: str) -> float | None:
        """How long a step will take, from earlier steps of its kind; None when there is none to compare with."""
        return self._estimates.seconds(name)

    def begin(self, steps: Iterable[str], machine: Machine | None = None) -> list[str]:
        """Checks, before `steps` are run, that they can be: see `build.admission`."""
        return admission.begin(self, steps, machine)

    def interrupt(self) -> None:
        """Makes the steps that run fail at once, and no other begin. For signal handlers."""
        for executor in self.executors.values():
            executor.kill()
        self.store.interrupt()
        self._cancellation.cancel()

    def close(self) -> None:
        """Ends the worker processes, and this process's work with the store."""
        for executor in self.executors.values():
            executor.close()
        self.store.close()

    @cached_property
    def _estimates(self) -> Estimates:
        from furiosa_build.build.estimates import Estimates  # nothing to do, nothing to estimate

        return Estimates(self.plan, self.options, self.models, self.store, self.directory)

    @property
    def _publication(self) -> Publication:
        return Publication(self.directory, self.store, self.files.record("package"))

    def _execute(self, step: PlannedStep, output: Path) -> ActionResult:
        request, log = step.type.request(step, self.files), self.store.log_path(step.name)
        return self.executors[step.type.worker].run(step.name, step.type, request, output, log)

    def _find(self, name: str) -> ActionRecord | None:
        """The step's action, if its key is known and the store has it."""
        if name not in self.outcomes:
            factors, missing = self._factors.known(self.plan, self.plan.steps[name])
            record = None if missing else self.store.find(key_of(factors))
            if record is None:
                return None
            self.outcomes[name] = Outcome(record, ran=False)
        return self.outcomes[name].record

    def _why_not_done(self, step: PlannedStep) -> Explanation:
        factors, missing = self._factors.known(self.plan, step)
        earlier = (finished.factors for finished in self._estimates.history if finished.step == step.own_name)
        found = explain_step(step.name, factors, missing, earlier)
        names = {self.plan.steps[name].name_for(step): name for name in step.needs}
        return replace(found, waits_for=tuple(names.get(one, one) for one in found.waits_for))


def open_build(name: str, overrides: list[str], cwd: Path | None = None, listeners: Iterable[Listener] = ()) -> Build:
    """The build of the recipe of that name, as `open_recipe`."""
    return open_recipe(load_recipe(name, overrides, cwd=cwd), cwd, listeners)


def open_recipe(recipe: Recipe, cwd: Path | None = None, listeners: Iterable[Listener] = ()) -> Build:
    """The build of a recipe. Raises UserError for every mistake that can be seen before work starts."""
    build = Build(recipe, cwd, listeners)
    try:
        _ = build.plan  # An architecture that cannot be built is refused here.
    except BaseException:
        build.close()
        raise
    return build
