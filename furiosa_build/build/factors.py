"""What the keys of steps are made of, found from the project's source, installed tools and what steps have made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from furiosa_build.backends.base import Backend
from furiosa_build.build.models import OpenModel
from furiosa_build.core.errors import StepError
from furiosa_build.plan.explain import FactorPath
from furiosa_build.plan.keys import ToolVersions, key_factors
from furiosa_build.plan.planner import Plan, PlannedStep
from furiosa_build.plan.source_code import SourceCode
from furiosa_build.quant.scheme import modules as scheme_modules
from furiosa_build.quant.scheme import versions as scheme_versions
from furiosa_build.steps.base import Job
from furiosa_build.store import ActionRecord

_OWN = "furiosa_build."


class Factors:
    """The factors of keys.

    Args:
        models: The models of the build, by id.
        code: The project's source.
        find: The action of a step, by the step's name, if it is known and done.
    """

    def __init__(
        self, models: Mapping[str, OpenModel], code: SourceCode, find: Callable[[str], ActionRecord | None]
    ) -> None:
        self._models, self._code, self._find = models, code, find
        self._versions = ToolVersions()

    def known(self, plan: Plan, step: PlannedStep) -> tuple[dict[str, Any], list[FactorPath]]:
        """The factors that are known, and where in them something will stand that is not known yet."""
        inputs: dict[str, Mapping[str, str]] = {}
        missing: list[FactorPath] = []
        for name, pattern in step.needs.items():
            record, known_as = self._find(name), plan.steps[name].name_for(step)
            if record is None:
                missing.append(("inputs", known_as))
            else:
                files = record.outputs.items()
                inputs[known_as] = {path: output.sha256 for path, output in files if fnmatchcase(path, pattern)}
        model = self._models[step.model_id]
        if step.type.reads_source:
            identity = model.sources.identity()
            inputs["source"] = {name: known for name, known in identity.items() if known is not None}
            missing += [("inputs", "source", name) for name, known in identity.items() if known is None]
        return self.of(step.type, model.backend, step.reads, inputs, step.schemes), missing

    def complete(self, plan: Plan, step: PlannedStep) -> dict[str, Any]:
        """All factors of a step that is to be done; the source is read if they depend on it. Raises StepError."""
        factors, missing = self.known(plan, step)
        if not missing:
            return factors
        if not step.type.reads_source:
            raise StepError(step.name, "a step that it needs has not run")
        model = self._models[step.model_id]
        model.sources.read()
        factors, missing = self.known(plan, step)
        if missing:
            changing = model.spec.model.model_id_or_path
            raise StepError(step.name, f"the files of {changing} change while they are read")
        return factors

    def without_contents(self, plan: Plan, step: PlannedStep, needs: Mapping[str, str]) -> dict[str, Any]:
        """What tells a step from others before anything is done: `needs` stand for the files that it will need.

        Steps whose factors are equal so have equal keys.
        """
        inputs = {plan.steps[name].name_for(step): {pattern: needs[name]} for name, pattern in step.needs.items()}
        model = self._models[step.model_id]
        if step.type.reads_source:
            inputs["source"] = {name: known or "" for name, known in model.sources.identity().items()}
            inputs["source"][""] = model.sources.described
        return self.of(step.type, model.backend, step.reads, inputs, step.schemes)

    def of(
        self,
        job: Job[Any],
        backend: Backend,
        reads: Mapping[str, Any],
        inputs: Mapping[str, Mapping[str, str]],
        schemes: Collection[str] = (),
    ) -> dict[str, Any]:
        """The factors of work that reads this, has these inputs, and is about weights of these schemes."""
        modules = [type(job).__module__, *job.modules]
        modules += [type(backend).__module__] if job.runs_backend(reads) else []
        modules += scheme_modules(schemes) if job.uses_schemes else []
        # Another package's step or backend has a version instead.
        digests = self._code.digests([module for module in modules if module.startswith(_OWN)])
        return key_factors(job.name, reads, inputs, self.tools(job, backend, schemes), digests)

    def tools(self, job: Job[Any], backend: Backend, schemes: Collection[str] = ()) -> dict[str, str]:
        """The versions of what shapes an output."""
        return {
            **self._versions.of(job.packages),
            **self._versions.of_installed(job.optional_packages),
            **(backend.key_factors() if job.backend_tools else {}),
            **(backend.library_factors() if job.library_tools else {}),
            **(scheme_versions(schemes) if job.uses_schemes else {}),
        }
