"""fetch: the source of the model, as lists. Its files stay where they are: a directory or the hub's cache.

The weights may come from another directory: a quantized checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.steps.base import BuildState, Entry, Inputs, Likeness, Request, Step, Work
from furiosa_build.weights import listing

if TYPE_CHECKING:
    from furiosa_build.plan.budget.costs import Costs
    from furiosa_build.plan.budget.durations import KnownStep
    from furiosa_build.plan.planner import PlannedStep, Site


class FetchRequest(Request):
    """The source as it has been found and read, where the build has access to it."""

    weights: listing.ListedWeights
    model_files: listing.ModelFiles
    original: listing.Original


class Fetch(Step[FetchRequest]):
    """Writes weights.json, model_files.json and original.json."""

    name = label = "fetch"
    Request = FetchRequest
    worker = "here"
    reads_source = True
    modules = ("furiosa_build.weights.describe", "furiosa_build.weights.kinds")
    product = "download"
    kept = "downloads"

    def plan(self, site: Site) -> Entry:
        model = site.model
        weights = "weights" if model.seed is None else f"random weights from seed {model.seed}"
        origin = model.pretrained_id
        if model.checkpoint_name is not None:
            origin = f"{origin}, quantized in {model.checkpoint_name},"
        # The architecture is compared with the weights' own config.json.
        reads: dict[str, Any] = {"architecture": model.spec.model.architecture}
        if model.seed is not None:
            parameters = {name: parameter.model_dump() for name, parameter in model.outline.parameters.items()}
            reads |= {"seed": model.seed, "parameters": parameters}
        return Entry(self.name, f"find the {weights} of {origin} and list them by digest", needs={}, reads=reads)

    def request(self, step: PlannedStep, state: BuildState) -> FetchRequest:
        weights, model_files, original = state.source(step.model_id)
        return FetchRequest(weights=weights, model_files=model_files, original=original)

    def run(self, request: FetchRequest, inputs: Inputs, output: Path) -> None:
        lists = {
            listing.WEIGHTS: request.weights,
            listing.MODEL_FILES: request.model_files,
            listing.ORIGINAL: request.original,
        }
        for name, content in lists.items():
            (output / name).write_bytes(canonical_json(content.model_dump(mode="json")))

    def work(self, step: PlannedStep, costs: Costs) -> Work:
        sizes = costs.of(step)
        return Work(sizes.source.unread + sizes.missing, sizes.missing)

    def likeness(self, step: KnownStep) -> Likeness | None:
        """Files are hashed, or come through a network: nobody knows how fast. Weights that are drawn are only named."""
        return Likeness() if step.is_drawn else None
