"""The BuildSpec of a draft model: what its recipe says of the model, in the shapes and on the devices of another."""

from __future__ import annotations

from pydantic import ValidationError

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.explain_mistakes import Place, combine, user_errors
from furiosa_build.recipe.schema import BuildSpec


def draft_spec(draft: BuildSpec, target: BuildSpec, where: str) -> BuildSpec:
    """What is built of the recipe `draft` so that it proposes tokens for `target`.

    The model is its own, as are quantization, rewriting, ranks and stages. Shapes, devices, backend and scheduler are
    those of the target, and there is one draft for each of its replicas. It has as many KV blocks as the target
    (`plan.kv_blocks`), and as it verifies nothing, no derived append buckets for that.

    Args:
        draft: The recipe as it stands.
        target: The model that verifies.
        where: What names the recipe, for messages.

    Raises:
        UserError: It has a draft itself, or it cannot be built in these shapes.
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
        what = f"the draft {draft.name!r} takes {ranks} ranks x {stages} stages, and the model {elements} elements"
        raise UserError(
            what, where=where, valid=f"a recipe for at most {elements}, of which each is one of the model's"
        )
    try:
        return BuildSpec.model_validate(
            {
                **draft.model_dump(),
                "devices": target.devices,
                "target": target.target.model_dump(),
                "backend": target.backend.model_dump(),
                "buckets": buckets.model_dump(),
                "scheduler": target.scheduler.model_dump(),
                "parallel": {**draft.parallel.model_dump(), "data_parallel_size": 1},
            }
        )
    except ValidationError as error:
        place = f"{where}: the draft {draft.name!r} in these buckets"
        raise combine(user_errors(error, lambda _: Place(place)), draft.name, place) from None
