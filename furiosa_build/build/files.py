"""The files of a build: what its steps have made, and where on this machine the inputs of a request are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from furiosa_build.build.factors import Factors
from furiosa_build.build.models import OpenModel
from furiosa_build.core.errors import StepError
from furiosa_build.plan.model import step_name
from furiosa_build.plan.planner import Plan, PlannedStep
from furiosa_build.steps.base import Inputs, Request
from furiosa_build.store import ActionRecord, Output, Store
from furiosa_build.weights.listing import MODEL_FILES, ORIGINAL, WEIGHTS, ListedWeights, ModelFiles, Original


class Files:
    """Files in the store and of the models' sources: a `steps.base.BuildState`.

    Args:
        store: Where the outputs of steps are.
        models: The models of the build, by id.
        plan: Gives the build's plan, once it is needed.
        factors: The factors of the steps' keys.
        find: The action of a step, by the step's name, if it is known and done.
    """

    def __init__(
        self,
        store: Store,
        models: Mapping[str, OpenModel],
        plan: Callable[[], Plan],
        factors: Factors,
        find: Callable[[str], ActionRecord | None],
    ) -> None:
        self._store, self._models, self._plan, self._factors, self._find = store, models, plan, factors, find
        self._read: dict[str, Path] = {}

    def record(self, step: str) -> ActionRecord:
        """The action of a step that is done. Raises StepError for one that is not."""
        record = self._find(step)
        if record is None:
            raise StepError(step, "its output is not in the store; build again")
        return record

    def files(self, step: str) -> Mapping[str, Output]:
        """The outputs of a step, by relative path."""
        return self.record(step).outputs

    def json(self, step: str, path: str) -> Any:
        """The content of one of them."""
        return self._store.read_json(self.record(step), path)

    def source(self, model_id: str) -> tuple[ListedWeights, ModelFiles, Original]:
        """The files that a model's build begins with."""
        return self._models[model_id].sources.describe(self._plan().models[model_id].outline.parameters)

    def read_source(self, files: Mapping[str, Path]) -> dict[str, str]:
        """sha256 of files of a source, by name. Requests may name them before `fetch` has listed them."""
        digests = {name: self._store.hashes.hash(path) for name, path in files.items()}
        self._read.update({digests[name]: path for name, path in files.items()})
        return digests

    def tools(self, step: PlannedStep) -> Mapping[str, str]:
        """The versions that are part of a step's key."""
        return self._factors.tools(step.type, self._models[step.model_id].backend, step.schemes)

    def inputs(self, request: Request) -> Inputs:
        """The inputs of a request. Raises UserError when one that is a source's is not as it was fetched."""
        found = {sha256: path for sha256, path in self._read.items() if self._store.hashes.hash(path) == sha256}
        wanted = set(request.inputs.values()) - found.keys()
        for model_id in self._models if wanted else ():
            if self._find(step_name(model_id, "fetch")) is not None:
                found.update(self._source_files(model_id, wanted))
        files = {name: self._file(sha256, found) for name, sha256 in request.inputs.items()}
        return Inputs(files, self._store.scratch(self._models[""].spec.backend.name))

    def _file(self, sha256: str, of_source: Mapping[str, Path]) -> Path:
        """The file of this digest: the store's, where it is known to be whole, since steps link their inputs."""
        blob = self._store.blob(sha256)
        is_whole = blob.exists() and self._store.link_hashes.recall(blob) == sha256
        return blob if is_whole else of_source.get(sha256, blob)

    def _source_files(self, model_id: str, wanted: set[str]) -> Iterator[tuple[str, Path]]:
        """The files of a model's source that are wanted, with their sha256."""
        fetched, sources = step_name(model_id, "fetch"), self._models[model_id].sources
        weights = ListedWeights.model_validate(self.json(fetched, WEIGHTS))
        others = ModelFiles.model_validate(self.json(fetched, MODEL_FILES))
        original = Original.model_validate(self.json(fetched, ORIGINAL))
        if wanted & {file.sha256 for file in weights.files.values()}:
            found = sources.unchanged_weights(weights.files, others.revision)
            yield from ((weights.files[name].sha256, path) for name, path in found.items())
        if wanted & {file.sha256 for file in others.files.values()}:
            found = sources.unchanged_model_files(others.files, others.revision)
            yield from ((others.files[name].sha256, path) for name, path in found.items())
        if wanted_here := {name: file for name, file in original.files.items() if file.sha256 in wanted}:
            found = sources.unchanged_original(wanted_here, others.revision)
            yield from ((original.files[name].sha256, path) for name, path in found.items())
        if original.texts is not None and original.texts.sha256 in wanted:
            yield original.texts.sha256, sources.unchanged_texts(original.texts)
