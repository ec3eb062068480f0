"""kernels: the library that all programs of a backend call, for backends that have one. It depends on no model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_build.backends.registry import get_backend
from furiosa_build.steps.base import BuildState, Entry, Inputs, Request, Step, Work

if TYPE_CHECKING:
    from furiosa_build.plan.budget.costs import Costs
    from furiosa_build.plan.planner import PlannedStep, Site


class KernelsRequest(Request):
    """The library of a backend is wanted.

    Attributes:
        backend: The backend's name.
    """

    backend: str


class Kernels(Step[KernelsRequest]):
    """Writes the library, under the name that the backend has for it."""

    name = label = "kernels"
    Request = KernelsRequest
    worker = "compiler"
    library_tools = True
    product = "programs"

    def applies(self, site: Site) -> bool:
        return get_backend(site.model.spec.backend.name).library is not None

    def plan(self, site: Site) -> Entry:
        backend = site.model.spec.backend.name
        return Entry(self.name, f"compile the kernels of {backend}", {}, {"backend": backend})

    def request(self, step: PlannedStep, state: BuildState) -> KernelsRequest:
        del state
        return KernelsRequest(backend=step.model.spec.backend.name)

    def work(self, step: PlannedStep, costs: Costs) -> Work:
        return Work(written=costs.of(step).library)

    def scratch(self, step: PlannedStep, costs: Costs) -> int:
        return costs.of(step).library  # the object files

    def worker_memory(self, step: PlannedStep, costs: Costs) -> int:
        return costs.of(step).library_worker

    def run(self, request: KernelsRequest, inputs: Inputs, output: Path) -> None:
        backend = get_backend(request.backend)
        assert backend.library is not None
        backend.build_library(output / backend.library, inputs.scratch)
