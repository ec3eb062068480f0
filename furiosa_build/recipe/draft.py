"""The BuildSpec of a draft model: its own recipe, in the shapes and on the devices of the model that it drafts for."""

from __future__ import annotations

from pydantic import ValidationError

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.explain_mistakes import Location, combine, user_errors
from furiosa_build.recipe.schema import BuildSpec


def draft_spec(draft: BuildSpec, target: BuildSpec, where: str) -> BuildSpec:
    """The BuildSpec of the recipe `draft`, built so that it proposes tokens for `target`.

    The model is its own, as are quantization, rewriting, ranks and stages. Shapes, devices, backend and scheduler are
    those of the target, and each of its replicas has one draft. The draft has as many KV blocks as the target
    (`plan.kv_blocks`) and no append buckets for verification, since it verifies nothing.

    Args:
        draft: The recipe as written.
        target: The model that verifies.
        where: What names the recipe, for messages.

    Raises:
        UserError: The draft has a draft itself, or cannot be built in these shapes.
    """
    if draft.speculative.recipe is not None:
        what = f"the draft {draft.name!r} is speculative itself, with the draft {draft.speculative.recipe!r}"
        raise UserError(what, where=where, valid="a recipe without speculative.recipe")
    buckets = target.buckets.model_copy(
        update={"paged_attention_num_blocks": None, "kv_cache_sharing_across_beams_config": None}
    )
    ranks, stages = draft.parallel.tensor_parallel_size, draft.parallel.pipeline_parallel_size
    elements = target.parallel.tensor_parallel_size * target.parallel.pipeline_parallel_size
    if ranks * stages > elements:
        what = f"the draft {draft.name!r} takes {ranks} ranks x {stages} stages, but the model has {elements} elements"
        raise UserError(
            what, where=where, valid=f"a recipe for at most {elements} elements: the draft runs on those of the model"
        )
    try:
        return BuildSpec.model_validate(
            {
                **draft.model_dump(),
                "devices": target.devices,
                "target": target.target.model_dump(),
                "backend": target.backend.model_dump(),
                "buckets": buckets.model_dump(exclude_unset=True),
                "scheduler": target.scheduler.model_dump(),
                "parallel": {**draft.parallel.model_dump(), "data_parallel_size": 1},
            }
        )
    except ValidationError as error:
        location = f"{where}: the draft {draft.name!r} in these buckets"
        raise combine(user_errors(error, lambda _: Location(location)), draft.name, location) from None
