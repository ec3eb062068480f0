"""The models that a build begins with: their recipes, backends and sources, opened and looked at before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from furiosa_build.backends.base import Backend, check_options
from furiosa_build.backends.registry import get_backend
from furiosa_build.build.mistakes import errors_of
from furiosa_build.core.errors import UserError
from furiosa_build.core.file_digests import HashMemory
from furiosa_build.ir.loading import Loading
from furiosa_build.ir.outline import Outline
from furiosa_build.plan.budget.placement import check_parallel
from furiosa_build.plan.model import DRAFT, ModelPlan, plan_model
from furiosa_build.recipe.lengths import fit_length
from furiosa_build.recipe.schema import BuildSpec, Recipe, check_architecture
from furiosa_build.weights.sources import Sources

if TYPE_CHECKING:
    from furiosa_build.quant.compressed_tensors import QuantizedCheckpoint


@dataclass(frozen=True)
class OpenModel:
    """A model whose source has been found.

    Attributes:
        spec: What is built of it.
        backend: What compiles it.
        isa: The instruction set that it is compiled for.
        sources: Its files.
        checkpoint: The quantized weights that are taken, if the build does not quantize them itself.
    """

    spec: BuildSpec
    backend: Backend
    isa: str
    sources: Sources
    checkpoint: QuantizedCheckpoint | None

    def fitted(self, loading: Loading, length: int | None) -> OpenModel:
        """The model with a spec whose lengths fit it, where the recipe does not say them.

        Args:
            loading: What the model is.
            length: The longest sequence of the model whose draft this one is; None: it is none.

        Raises:
            UserError: The model has not what its spec asks for.
        """
        spec, where = self.spec, "model.architecture" if self.spec.model.architecture else "config.json"
        if length is not None:
            spec = fit_length(spec, length, f"max_seq_len_to_capture={length} of the model")
        check_architecture(spec, loading.hf_config, where)
        longest = loading.hf_config.get("max_position_embeddings", math.inf)
        if spec.buckets.max_seq_len_to_capture > longest:
            spec = fit_length(spec, longest, f"the model's max_position_embeddings={longest}")
        return replace(self, spec=spec)

    def plan(self, loading: Loading, outline: Outline) -> ModelPlan:
        """The model for a plan. Raises UserError when it cannot be divided or is not quantized as its spec says."""
        check_parallel(self.spec, loading.hf_config, outline)
        if self.checkpoint is not None:
            from furiosa_build.quant.compressed_tensors import check_quantizes

            check_quantizes(self.checkpoint, outline)
        return plan_model(self.spec, loading.hf_config, outline, self.isa, self.checkpoint, loading.stored_as)


def open_models(recipe: Recipe, hashes: HashMemory) -> dict[str, OpenModel]:
    """The models of a recipe, by id. Raises UserError for what is wrong with one of them."""
    models = {"": _open(recipe, hashes)}
    if recipe.draft is not None:
        with errors_of(DRAFT, recipe.draft.spec.name):
            models[DRAFT] = _open(recipe.draft, hashes)
    return models


def check_draft(planned: Mapping[str, ModelPlan]) -> None:
    """Raises UserError when a draft has another vocabulary than its model."""
    if DRAFT in planned:
        name = planned[DRAFT].spec.name
        own, found = (planned[model_id].hf_config["vocab_size"] for model_id in ("", DRAFT))
        if own != found:
            what = f"the draft {name!r} has a vocabulary of {found} tokens, the model of {own}"
            raise UserError(what, where="speculative.recipe", valid="a model with the same vocabulary")


def _open(recipe: Recipe, hashes: HashMemory) -> OpenModel:
    spec = recipe.spec
    backend = get_backend(spec.backend.name)
    check_options(backend, spec.backend.compiler_config_overrides)
    isa = backend.isa(spec.target.isa)
    sources = Sources(spec, recipe.roots, hashes)
    return OpenModel(spec, backend, isa, sources, sources.read_checkpoint())
