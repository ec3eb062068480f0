"""What a build will take: facts of this machine and of earlier builds, for `plan.budget`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path

from furiosa_build.build.models import OpenModel
from furiosa_build.core.system import Machine, disk_of, this_machine
from furiosa_build.plan.budget.costs import Disks, SourceState
from furiosa_build.plan.budget.durations import Durations, FinishedStep
from furiosa_build.plan.budget.preflight import Preflight, preflight
from furiosa_build.plan.planner import Plan
from furiosa_build.recipe.schema import BuildOptions
from furiosa_build.steps.registry import STEPS
from furiosa_build.store import Store
from furiosa_build.weights.hub import hub_cache


class Estimates:
    """What the steps of a build will take.

    Args:
        plan: The steps.
        options: How many workers were asked for.
        models: The models of the build, by id.
        store: Where earlier steps are recorded.
        output: Where the artifact goes.
    """

    def __init__(
        self, plan: Plan, options: BuildOptions, models: Mapping[str, OpenModel], store: Store, output: Path
    ) -> None:
        self._plan, self._options, self._models, self._store, self._output = plan, options, models, store, output

    @cached_property
    def history(self) -> list[FinishedStep]:
        """The steps that the store knows of, the last used first."""
        return [
            FinishedStep(record.step, record.seconds, factors, frozenset(o.sha256 for o in record.outputs.values()))
            for record, factors, _ in sorted(self._store.records(), key=lambda found: -found[2])
        ]

    def seconds(self, name: str) -> float | None:
        """How long a step will take; None when there is none to compare with."""
        return self._durations.estimate(self._plan.steps[name], self._plan)

    def preflight(self, undone: Mapping[str, bool], read: Collection[str], machine: Machine | None) -> Preflight:
        """The figures.

        Args:
            undone: The steps that are to do; False for one that may yet turn out to be up to date.
            read: The ids of the models whose source has been read.
            machine: Not this one.
        """
        disks = self._disks(read)
        return preflight(self._plan, self._options, undone, disks, machine or this_machine(), self._durations)

    @cached_property
    def _durations(self) -> Durations:
        return Durations(self.history, STEPS)

    def _disks(self, read: Collection[str]) -> Disks:
        store = self._store.root if self._store.is_writable else self._output.parent
        sources = {id: _source_state(model, id in read) for id, model in self._models.items()}
        return Disks(disk_of(store), disk_of(self._output), sources)


def _source_state(model: OpenModel, is_read: bool) -> SourceState:
    unread = 0 if is_read else model.sources.unread_bytes()
    if (hub := model.sources.downloads) is not None:
        return SourceState(disk_of(hub_cache()), hub.cached_bytes(), unread)
    return SourceState(unread=unread)
