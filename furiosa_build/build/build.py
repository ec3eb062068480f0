"""One build: the steps of a recipe, whether each is done, and how to run it.

The store's truth decides. A step's key is known once the outputs of the steps it needs are; a step is done when the
store holds the action of that key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_build.artifact import writer
from furiosa_build.build import admission
from furiosa_build.build.executors.base import Executor
from furiosa_build.build.executors.local import local_executors
from furiosa_build.build.factors import Factors
from furiosa_build.build.files import Files
from furiosa_build.build.mistakes import errors_of, failing
from furiosa_build.build.models import open_models
from furiosa_build.build.planning import Planning
from furiosa_build.build.planning_jobs import PlanningJobs
from furiosa_build.build.publish import PUBLISHED, Publication
from furiosa_build.core.cancellation import CancellationToken, cancelled_by
from furiosa_build.core.canonical_json import digest
from furiosa_build.core.events import Emitter, Listener
from furiosa_build.core.failpoints import doing
from furiosa_build.core.files import expand_user
from furiosa_build.core.progress import metered
from furiosa_build.core.system import Machine
from furiosa_build.plan.explain import Explanation, explain_step
from furiosa_build.plan.keys import key_of
from furiosa_build.plan.model import DRAFT
from furiosa_build.plan.planner import Plan, PlannedStep
from furiosa_build.plan.source_code import SourceCode
from furiosa_build.recipe.compose import load_recipe
from furiosa_build.recipe.schema import Recipe
from furiosa_build.store import ActionRecord, ActionResult, Outcome, Store, default_store_root

if TYPE_CHECKING:
    from furiosa_build.build.estimates import Estimates
    from furiosa_build.plan.budget.preflight import Preflight


@dataclass(frozen=True)
class PointOfSweep:
    """Where a build stands in a sweep.

    Attributes:
        number: The point's.
        beside: The build of another point, whose store, worker processes and listeners it shares; None: the first.
    """

    number: int
    beside: Build | None


class Build:
    """The build of one recipe.

    Args:
        recipe: What to build and how.
        cwd: What a relative `save_dir` is relative to.
        listeners: Called with the events of this build.
        point: Where the build stands in a sweep. None: it is none of one.
    """

    goals: Sequence[str] = ("qualify",)
    """The steps that all others are for."""
    goes_on = False
    """Whether steps that do not need one that failed run all the same."""

    def __init__(
        self,
        recipe: Recipe,
        cwd: Path | None = None,
        listeners: Iterable[Listener] = (),
        point: PointOfSweep | None = None,
    ) -> None:
        beside = None if point is None else point.beside
        self.events: Emitter = Emitter(listeners) if beside is None else beside.events
        self._point = point
        self.recipe, self.spec, self.options = recipe, recipe.spec, recipe.options
        self.cwd = cwd or Path.cwd()
        self.store: Store = self._open_store() if beside is None else beside.store
        self.models = open_models(recipe, self.store.hashes)
        self.outcomes: dict[str, Outcome] = {}
        self._cancellation = CancellationToken()
        self._code: SourceCode = SourceCode(memo=self.store.root / "code.json") if beside is None else beside._code
        self._factors = Factors(self.models, self._code, self._find)
        self.files = Files(self.store, self.models, lambda: self.plan, self._factors, self._find)
        self.executors: dict[str, Executor] = (
            local_executors(self.options, self.files.inputs)
            if beside is None
            else {name: executor.beside(self.files.inputs) for name, executor in beside.executors.items()}
        )
        jobs = PlanningJobs(self.store, self._factors, self.executors, self.events)
        self._planning = Planning(self.models, self.files, jobs)
        writer.check_destination(self.directory)
        writer.check_is_directory(self.store.root, "cache_dir")

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.spec.name

    @property
    def group_docs(self) -> Mapping[str, str]:
        """What groups of steps are for, by the beginning of their names."""
        docs = {
            "partition": "lay out the weights, and trace every kind in every bucket",
            "compile": "compile every graph",
        }
        if DRAFT in self.models:
            docs[DRAFT] = f"build {self.models[DRAFT].spec.name}, which proposes tokens"
        return docs

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

    @property
    def steps(self) -> Mapping[str, PlannedStep]:
        """The steps of the plan, by name, in an order in which they can run."""
        return self.plan.steps

    @cached_property
    def version_directory(self) -> Path:
        """Where the artifact is, once `package` is done; to be asked before the build is closed."""
        return self._publication.directory

    def place_of(self, name: str) -> str:
        """Nothing: a step's message names it."""
        del name
        return ""

    def result(self) -> Path:
        """The artifact's directory, when all is done."""
        return self.version_directory

    def is_done(self, name: str) -> bool:
        """Whether the step's output is in the store and, for `package` and `qualify`, in the output directory."""
        return self._find(name) is not None and (
            name not in PUBLISHED or self._publication.has(name, is_latest=self._point is None)
        )

    def run(self, name: str) -> Outcome:
        """Does the step unless the store has it, and what follows from it in the output directory.

        Raises UserError or StepError; what other steps have finished stays in the store.
        """
        step, called = self.plan.steps[name], self._called(name)
        mistakes = errors_of(step.model_id, step.model.spec.name)
        meter = metered(self.store.meter_path(called))
        with mistakes, failing(called), cancelled_by(self._cancellation), doing(name), meter:
            if self._find(name) is None:
                factors = self._factors.complete(self.plan, step)
                self.outcomes[name] = self.store.get_or_run(
                    key_of(factors), step.own_name, factors, lambda output: self._execute(step, output)
                )
                if step.type.reads_source:
                    self._planning.check_loading(step.model_id)
            if name == "package":
                self._publication.publish(filter(None, map(self._find, self.plan.steps)))
            if name == "qualify":
                self._publication.accept(self.outcomes[name].record, is_latest=self._point is None)
        return self.outcomes[name]

    def identities(self) -> dict[str, str]:
        """A digest for each step, by name, before anything is done: of builds that have equal ones, one does the step.

        What goes into the output directory, each build puts there itself.
        """
        found: dict[str, str] = {}
        for name, step in self.plan.steps.items():
            own = [self._called(name)] if name in PUBLISHED else []
            found[name] = digest([self._factors.without_contents(self.plan, step, found), own])
        return found

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

    def _open_store(self) -> Store:
        cache = self.options.cache_dir
        root = (expand_user(cache, "cache_dir") if cache else default_store_root()).absolute()
        store = Store(root, self.options.verify_inputs, self.directory.parent)
        store.notify = self.events.note
        return store

    def _called(self, step: str) -> str:
        """What a step is called where those of other builds are as well."""
        return step if self._point is None else f"{step}@{self._point.number}"

    @property
    def _publication(self) -> Publication:
        return Publication(self.directory, self.store, self.files.record("package"))

    def _execute(self, step: PlannedStep, output: Path) -> ActionResult:
        called, request = self._called(step.name), step.type.request(step, self.files)
        return self.executors[step.type.worker].run(called, step.type, request, output, self.store.log_path(called))

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
