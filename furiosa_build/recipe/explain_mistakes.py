"""Messages about what pydantic found wrong, for the person who wrote the recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from furiosa_build.core.errors import UserError, nearest
from furiosa_build.recipe.config_files import ConfigFile, Key, dotted, plain_text
from furiosa_build.recipe.overrides import Override, quoted
from furiosa_build.recipe.schema import BuildOptions, BuildSpec

_MAPPING = "a mapping: lines of the form `key: value`"
_WANTED = {
    "string_type": "a string",
    "string_unicode": "text in UTF-8",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "tuple_type": "a list",
    "none_required": "null",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "string_too_short": "a string that is not empty",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-'; the first one a letter or a digit",
}
_SECTIONS = [name for name, field in BuildSpec.model_fields.items() if isinstance(field.annotation, type(BaseModel))]


@dataclass(frozen=True)
class Location:
    """Where a value was set, and how it was spelled there; no text if that is unknown or it was quoted."""

    where: str
    text: str = ""
    on_command_line: bool = False


@dataclass(frozen=True)
class Locator:
    """Finds where a key was set: on the command line, or else in the file whose value won."""

    recipe: Path
    files: Sequence[ConfigFile]
    overrides: Sequence[Override]

    def __call__(self, key: Key) -> Location:
        for override in reversed(self.overrides):
            if override.choice is None and key[: len(override.key)] == override.key:
                text = override.text.partition("=")[2] if key == override.key else ""
                return Location(override.where, text, on_command_line=True)
        for length in range(len(key), 0, -1):  # A missing key is located by the section that lacks it.
            for file in self.files:
                if (node := file.find(key[:length])) is not None:
                    return Location(file.where(node, key), plain_text(node) if length == len(key) else "")
        return Location(str(self.recipe))


def user_errors(error: ValidationError, locate: Callable[[Key], Location]) -> list[UserError]:
    """One message for each mistake that pydantic found.

    Args:
        error: Raised by BuildSpec or BuildOptions.
        locate: Finds where a key was set.
    """
    return [_explain(details, locate) for details in error.errors(include_url=False)]


def combine(mistakes: list[UserError], recipe: str, where: str) -> UserError:
    """All mistakes as one message."""
    if len(mistakes) == 1:
        return mistakes[0]
    listed = "\n".join("- " + str(mistake).replace("\n", "\n  ") for mistake in mistakes)
    return UserError(f"{len(mistakes)} mistakes in recipe {recipe!r}:\n{listed}", where=where)


def _explain(details: ErrorDetails, locate: Callable[[Key], Location]) -> UserError:
    context = details.get("ctx", {})
    key: Key = (*details["loc"], *context.get("key", ()))
    value, kind, name, location = details["input"], details["type"], dotted(key), locate(key)
    if kind == "recipe":
        return UserError(context["what"], where=location.where, valid=context["valid"])
    if kind == "missing":
        hint = f"write it in the recipe, or give {name}=VALUE"
        if name in _SECTIONS:
            hint = f"add `- {name}: CHOICE` to the defaults list"
        return UserError(f"{name} is missing", where=location.where, hint=hint)
    if kind == "extra_forbidden":
        what, valid = f"unknown key {name}={_show(value)}", ", ".join(_fields(key[:-1]))
        return UserError(what, where=location.where, valid=valid, hint=_nearest_key(key))
    valid = _WANTED.get(kind, details["msg"].removeprefix("Input should be ")).format(**context)
    if kind == "string_type" and location.text and isinstance(value, int | float):
        what = f"{name}: {location.text} is read as {_read_as(value)}"
        return UserError(what, where=location.where, valid=valid, hint=_quote(key, location))
    what, hint = f"{name}: {_show(value)} is not valid", _hint(kind, name, value, valid)
    if kind == "string_type" and value is None and location.on_command_line:
        hint = _quote(key, location)
    return UserError(what, where=location.where, valid=valid, hint=hint)


def _hint(kind: str, name: str, value: object, valid: str) -> str:
    if kind == "literal_error":
        return nearest(str(value), re.findall(r"'([^']*)'", valid))
    if kind == "model_type" and isinstance(value, str) and name in _SECTIONS:
        return f"did you mean `- {name}: {value}` in the defaults list?"
    if kind in ("int_type", "bool_type") and re.fullmatch(r"\d+|true|false", str(value)):
        return "write it without quotes" if isinstance(value, str) else ""
    return ""


def _show(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _read_as(value: object) -> str:
    return f"the boolean {str(value).lower()}" if isinstance(value, bool) else f"the number {value}"


def _quote(key: Key, location: Location) -> str:
    if location.on_command_line:
        return f"quote it, for the shell and for Hydra: {quoted(dotted(key), location.text)}"
    return f'quote it: {key[-1]}: "{location.text}"'


def _nearest_key(key: Key) -> str:
    """A hint for an unknown key: the key of that name in another section, or a similar one beside it."""
    elsewhere = [full for full in _all_keys(BuildSpec) if full.rpartition(".")[2] == key[-1]]
    return f"did you mean {elsewhere[0]!r}?" if elsewhere else nearest(str(key[-1]), _fields(key[:-1]))


def _fields(section: Key) -> list[str]:
    """The keys of a section."""
    if not section:
        return [*BuildSpec.model_fields, *BuildOptions.model_fields]
    model: Any = BuildSpec
    for part in section:
        # Below an index: the items of an Annotated tuple.
        model = get_args(model)[0] if isinstance(part, int) else model.model_fields[part].annotation
    return list(model.model_fields)


def _all_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _all_keys(field.annotation, f"{prefix}{name}.")
