"""A sweep: the builds of several points of a recipe as one graph, in which what points share is one step."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from furiosa_build.build.build import Build, PointOfSweep
from furiosa_build.core.errors import StepError
from furiosa_build.core.events import Emitter, Listener
from furiosa_build.core.system import Machine
from furiosa_build.recipe.schema import BuildOptions
from furiosa_build.recipe.sweep import Mistakes, Point
from furiosa_build.store import Outcome, Store


@dataclass(frozen=True)
class SharedStep:
    """A step of a sweep.

    Attributes:
        build: The build that does it: that of the first point that needs it.
        own_name: What that build calls it.
        description: One line for listings.
        needs: The steps whose outputs it consumes, by their names in the sweep.
        points: The numbers of the points that need it.
    """

    build: Build
    own_name: str
    description: str
    needs: Sequence[str]
    points: list[int] = field(default_factory=list)


class Sweep:
    """The builds of several points. It is run as a build is, by `build.graph`.

    A step is called as in its build, with the number of the first point that needs it: `compile:decode-1x512:block@0`.

    Args:
        points: Distinct points of one recipe, with the same options.
        cwd: What a relative `save_dir` is relative to.
        listeners: Called with the events of all builds.
        fail_fast: Whether no step begins once one has failed.

    Raises:
        UserError: A point that cannot be built. One error lists all of them.

    Attributes:
        results: The artifacts of the points that are built, by the points' numbers.
        has_begun: Whether steps have run: before, the sweep may be refused as a whole.
    """

    def __init__(
        self,
        points: Sequence[Point],
        cwd: Path | None = None,
        listeners: Iterable[Listener] = (),
        fail_fast: bool = False,
    ) -> None:
        self.points, self.goes_on = points, not fail_fast
        self.builds: list[Build] = []
        self.results: dict[int, Path] = {}
        self.has_begun = self._has_failed = False
        self._alone = _Alone()
        mistakes = Mistakes(len(points))
        try:
            for number, point in enumerate(points):
                with mistakes.of(point.title):
                    beside = self.builds[0] if self.builds else None
                    self.builds.append(Build(point.recipe, cwd, listeners, PointOfSweep(number, beside)))
                    _ = self.builds[-1].plan  # what cannot be built is refused here
            mistakes.refuse()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.builds[0].name

    @property
    def options(self) -> BuildOptions:
        """Where and how all points are built."""
        return self.builds[0].options

    @property
    def store(self) -> Store:
        """Where finished steps are."""
        return self.builds[0].store

    @property
    def events(self) -> Emitter:
        """Passes on the events of all builds."""
        return self.builds[0].events

    @property
    def group_docs(self) -> Mapping[str, str]:
        """What groups of steps are for, by the beginning of their names."""
        return self.builds[0].group_docs

    @cached_property
    def steps(self) -> Mapping[str, SharedStep]:
        """The distinct steps of all points, by name, in an order in which they can run."""
        steps: dict[str, SharedStep] = {}
        names: dict[str, str] = {}  # by identity
        for number, build in enumerate(self.builds):
            identities = build.identities()
            for own_name, step in build.steps.items():
                name = names.setdefault(identities[own_name], f"{own_name}@{number}")
                if name not in steps:
                    needs = [names[identities[need]] for need in step.needs]
                    steps[name] = SharedStep(build, own_name, step.description, needs)
                steps[name].points.append(number)
        return steps

    @property
    def num_planned(self) -> int:
        """Steps of all points, those that they share counted for each."""
        return sum(len(build.steps) for build in self.builds)

    @property
    def goals(self) -> Sequence[str]:
        """The last step of each point."""
        return [f"{goal}@{number}" for number, build in enumerate(self.builds) for goal in build.goals]

    @property
    def outcomes(self) -> Mapping[str, Outcome]:
        """How steps were done, by name."""
        found = ((name, step.build.outcomes.get(step.own_name)) for name, step in self.steps.items())
        return {name: outcome for name, outcome in found if outcome is not None}

    def is_done(self, name: str) -> bool:
        """As `Build.is_done`."""
        step = self.steps[name]
        is_done = step.build.is_done(step.own_name)
        if is_done and name in self.goals:
            self._note_result(step.build)
        return is_done

    def run(self, name: str) -> Outcome:
        """As `Build.run`."""
        step = self.steps[name]
        with self._alone.running(step.build.steps[step.own_name].type.alone):
            if self._has_failed and not self.goes_on:
                raise StepError(name, "it has not begun, since another one has failed")
            try:
                outcome = step.build.run(step.own_name)
            except Exception:
                self._has_failed = True
                raise
        if name in self.goals:
            self._note_result(step.build)
        return outcome

    def estimate_seconds(self, name: str) -> float | None:
        """As `Build.estimate_seconds`."""
        return self.steps[name].build.estimate_seconds(self.steps[name].own_name)

    def begin(self, steps: Iterable[str], machine: Machine | None = None) -> list[str]:
        """Checks, before `steps` are run, that they can be. Returns notes for people, each once."""
        wanted = [self.steps[name] for name in steps]
        notes: list[str] = []
        for build in self.builds:
            notes += build.begin([step.own_name for step in wanted if step.build is build], machine)
        self.has_begun = True
        return list(dict.fromkeys(notes))

    def place_of(self, name: str) -> str:
        """The points that a step is for, such as `point 2, quantization=int8: `."""
        step = self.steps.get(name)
        if step is None:
            return ""
        if len(step.points) > 1:
            return f"points {', '.join(map(str, step.points))}: "
        [number] = step.points
        title = self.points[number].title
        return f"point {number}, {title}: " if title else f"point {number}: "

    def _note_result(self, build: Build) -> None:
        self.results[self.builds.index(build)] = build.version_directory

    def result(self) -> Path | None:
        """None: a sweep has a result for each point."""
        return None

    def interrupt(self) -> None:
        """As `Build.interrupt`."""
        for build in self.builds:
            build.interrupt()

    def close(self) -> None:
        """As `Build.close`."""
        for build in self.builds[:1]:
            build.close()


class _Alone:
    """Lets a step that takes the memory or the processors of all others run alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._has_one_alone = False

    @contextmanager
    def running(self, alone: bool) -> Iterator[None]:
        """A step runs; `alone`: no other does meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._has_one_alone and not (alone and self._running))
            self._running, self._has_one_alone = self._running + 1, alone
        try:
            yield
        finally:
            with self._changed:
                self._running, self._has_one_alone = self._running - 1, False
                self._changed.notify_all()
