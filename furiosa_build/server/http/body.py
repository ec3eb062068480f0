"""Bodies of requests: null stands for a field that is not given, and fields that nobody knows are told, not refused."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from furiosa_build.server.http.errors import bad_request


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_whole)]
"""An integer as JSON has it: 1.0 is one."""


class Unsupported(NamedTuple):
    """A field that would change the answer, and cannot here: why, and the values that ask for nothing."""

    why: str
    neutral: tuple[Any, ...] = ()


class Body(BaseModel):
    """Base of all requests and of their parts.

    Attributes:
        without_effect: Names of fields that are taken, and change nothing. Those of base classes are too.
        unsupported: Fields that are refused by name; likewise.
    """

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    without_effect: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[Mapping[str, Unsupported]] = {}

    @property
    def engine_names(self) -> dict[str, str]:
        """Fields by other names that the engine's errors have for them."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The schema, in which every optional field takes null as well."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        for name, field in schema.get("properties", {}).items():
            if name not in schema.get("required", ()):
                types = field.pop("anyOf", None) or [{key: field.pop(key) for key in list(field) if key != "default"}]
                field["anyOf"] = types if {"type": "null"} in types else [*types, {"type": "null"}]
        return reference


def unknown_fields(body: Body) -> list[str]:
    """The names of the fields that a body has and its class does not, as paths such as `messages.0.name`.

    They are gone from it afterwards.

    Raises:
        ApiError: One of them is not supported.
    """
    found = []
    for path, part in _parts(body, ""):
        extra = part.__pydantic_extra__ or {}
        for name, value in extra.items():
            unsupported = _unsupported(type(part)).get(name)
            if unsupported is None and name not in _without_effect(type(part)):
                found.append(path + name)
            elif unsupported is not None and value not in unsupported.neutral:
                raise bad_request(f"{path}{name} is not supported: {unsupported.why}", path + name, "unsupported")
        extra.clear()
    return found


@cache
def _without_effect(kind: type[Body]) -> frozenset[str]:
    return frozenset[str]().union(*(vars(base).get("without_effect", ()) for base in kind.__mro__))


@cache
def _unsupported(kind: type[Body]) -> dict[str, Unsupported]:
    return dict(ChainMap(*(vars(base).get("unsupported", {}) for base in kind.__mro__)))


def _parts(value: Any, path: str) -> Iterator[tuple[str, Body]]:
    if isinstance(value, Body):
        yield path, value
        for name, field in type(value).model_fields.items():
            yield from _parts(getattr(value, name), f"{path}{field.alias or name}.")
    elif isinstance(value, list) and value and isinstance(value[0], Body | list):  # and not thousands of token ids
        for index, each in enumerate(value):
            yield from _parts(each, f"{path}{index}.")
