"""What the sections of a BuildSpec share: their base class, their errors, and conversions."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base class of a section: frozen, unknown keys refused, no silent conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


def invalid(what: str, *, key: tuple[str | int, ...] = (), valid: str = "") -> PydanticCustomError:
    """An error that keeps its parts for `recipe.explain_mistakes`. `key` is the path from the section to the value."""
    template = "{what} (valid: {valid})" if valid else "{what}"
    return PydanticCustomError("recipe", template, {"what": what, "key": key, "valid": valid})


def as_tuple(value: Any) -> Any:
    """`value` with every list, at any depth, as a tuple."""
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value
