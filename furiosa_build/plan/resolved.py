"""A BuildSpec without what belongs to one machine: as the artifact tells of it, and as other machines can take it."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from furiosa_build.recipe.schema import BuildSpec, ModelSpec, QualifySpec


def pretrained_id(model: ModelSpec) -> str:
    """The model's name without a machine's directories: a hub id or a relative path as it is, else the last part."""
    return without_place(model.model_id_or_path)


def without_place(name: str) -> str:
    path = PurePath(name)
    is_place = path.is_absolute() or str(path)[0] in ".~"
    return path.name if is_place and path.name else path.as_posix()


def resolved_recipe(spec: BuildSpec) -> dict[str, Any]:
    """The BuildSpec as the artifact tells of it, without what belongs to a machine.

    Nor the revision: a branch is the commit that it stands for, and `fetch` says which. Nor where parameters lie, and
    how much memory there is: the number of KV blocks that may follow from it stands in the artifact. Nor how it is
    judged. Nor, without a draft model, that there is none.
    """
    recipe = spec.model_dump(mode="json", exclude={"target": {"memory_gb"}, "model": {"revision", "param_file_path"}})
    del recipe["qualify"]
    recipe["model"]["model_id_or_path"] = pretrained_id(spec.model)
    if (path := spec.quantization.quantize_artifact_path) is not None:
        recipe["quantization"]["quantize_artifact_path"] = without_place(path)
    recipe["parallel"]["data_parallel_size"] = spec.data_parallel_size
    if spec.speculative.recipe is None:
        del recipe["speculative"]
    else:
        recipe["speculative"]["num_speculative_tokens"] = spec.num_speculative_tokens
    return recipe


def portable_spec(spec: BuildSpec) -> BuildSpec:
    """The spec without paths of this machine: the model and a checkpoint are named, and not where they lie."""
    path = spec.quantization.quantize_artifact_path
    name = None if path is None else without_place(path)
    return spec.model_copy(
        update={
            "model": spec.model.model_copy(
                update={"model_id_or_path": pretrained_id(spec.model), "param_file_path": None}
            ),
            "qualify": QualifySpec(),
            "quantization": spec.quantization.model_copy(update={"quantize_artifact_path": name}),
        }
    )
