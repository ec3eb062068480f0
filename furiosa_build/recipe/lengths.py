"""The longest sequence of a recipe that does not say: a default, as far as the model goes."""

from __future__ import annotations

from pydantic import ValidationError

from furiosa_build.recipe.explain_mistakes import Location, combine, user_errors
from furiosa_build.recipe.schema import BuildSpec


def fit_length(spec: BuildSpec, longest: int, why: str) -> BuildSpec:
    """The spec, with sequences of up to `longest` tokens if it does not say; buckets not given are as long.

    Args:
        spec: As composed.
        longest: Tokens.
        why: What limits them, for messages.

    Raises:
        UserError: Something else in the spec needs longer ones.
    """
    buckets = spec.buckets
    if "max_seq_len_to_capture" in buckets.model_fields_set or buckets.max_seq_len_to_capture == longest:
        return spec
    given = {name: getattr(buckets, name) for name in buckets.model_fields_set}
    try:
        return BuildSpec.model_validate({**dict(spec), "buckets": {**given, "max_seq_len_to_capture": longest}})
    except ValidationError as error:
        raise combine(user_errors(error, lambda _: Location(why)), spec.name, why) from None
