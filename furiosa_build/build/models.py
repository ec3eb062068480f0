"""The models that a build begins with: their recipes, backends and sources, opened and looked at before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from furiosa_build.backends.base import Backend, check_options
from furiosa_build.backends.registry import get_backend
from furiosa_build.build.mistakes import errors_of
from furiosa_build.core.errors import UserError
from furiosa_build.core.file_digests import HashMemory
from furiosa_build.ir.outline import Outline
from furiosa_build.plan.budget.placement import check_parallel
from furiosa_build.plan.model import DRAFT, ModelPlan, plan_model
from furiosa_build.recipe.lengths import fit_length
from furiosa_build.recipe.schema import BuildSpec, Recipe, check_architecture
from furiosa_build.weights.config import cut_config
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
        hf_config: The fields of its config.json, of the layers that are built.
    """

    spec: BuildSpec
    backend: Backend
    isa: str
    sources: Sources
    checkpoint: QuantizedCheckpoint | None
    hf_config: Mapping[str, Any]

    def plan(self, outline: Outline) -> ModelPlan:
        """The model for a plan. Raises UserError when it cannot be divided or is not quantized as its spec says."""
        check_parallel(self.spec, self.hf_config, outline)
        if self.checkpoint is not None:
            from furiosa_build.quant.compressed_tensors import check_quantizes

            check_quantizes(self.checkpoint, outline)
        return plan_model(self.spec, self.hf_config, outline, self.isa, self.checkpoint)


def open_models(recipe: Recipe, hashes: HashMemory) -> dict[str, OpenModel]:
    """The models of a recipe, by id. Raises UserError for what is wrong with one of them."""
    models = {"": _open(recipe, hashes)}
    if recipe.draft is not None:
        name, length = recipe.draft.spec.name, models[""].spec.buckets.max_seq_len_to_capture
        with errors_of(DRAFT, name):
            spec = fit_length(recipe.draft.spec, length, f"max_seq_len_to_capture={length} of the model")
            models[DRAFT] = _open(recipe.draft.model_copy(update={"spec": spec}), hashes)
        own, found = (model.hf_config["vocab_size"] for model in models.values())
        if own != found:
            what = f"the draft {name!r} has a vocabulary of {found} tokens, the model of {own}"
            raise UserError(what, where="speculative.recipe", valid="a model with the same vocabulary")
    return models


def _open(recipe: Recipe, hashes: HashMemory) -> OpenModel:
    spec = recipe.spec
    backend = get_backend(spec.backend.name)
    check_options(backend, spec.backend.compiler_config_overrides)
    isa = backend.isa(spec.target.isa)
    sources = Sources(spec, recipe.roots, hashes)
    where = "model.architecture" if spec.model.architecture else "config.json"
    check_architecture(spec, sources.config, where)
    longest = sources.config["max_position_embeddings"]
    if spec.buckets.max_seq_len_to_capture > longest:
        spec = fit_length(spec, longest, f"the model's max_position_embeddings={longest}")
    checkpoint, hf_config = sources.read_checkpoint(), cut_config(sources.config, spec.model)
    return OpenModel(spec, backend, isa, sources, checkpoint, hf_config)
