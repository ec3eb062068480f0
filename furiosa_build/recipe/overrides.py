"""Overrides on the command line, parsed with Hydra's parser before anything is composed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.config_files import Key, dotted, parse_key
from furiosa_build.recipe.defaults import Choice

_FORMS = "key=value, group=choice, +key=value (add), ~key (remove)"


@dataclass(frozen=True)
class Override:
    """An override. `for_hydra` is the text that is passed to Hydra for it."""

    text: str
    key: Key
    value: Any
    is_group: bool
    for_hydra: str

    @property
    def where(self) -> str:
        """Where it was given, for a message."""
        return f"command line: {self.text}"

    @property
    def choice(self) -> Choice | None:
        """The config that it chooses for a group; None where it sets a key or removes a group."""
        return Choice(self.value, self.where) if self.is_group and self.value is not None else None


def parse_overrides(texts: Sequence[str], groups: Sequence[str]) -> list[Override]:
    """Parse overrides of every form that Hydra knows, except those of a multirun.

    Args:
        texts: As typed, one argument each.
        groups: The names of all config groups, which tell `group=choice` from `key=value`.
    """
    if not texts:
        return []
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    return [_parse(parser, text, groups) for text in texts]


def choices(overrides: Sequence[Override]) -> dict[str, Choice]:
    """The choices that the overrides make, by group."""
    return {dotted(override.key): choice for override in overrides if (choice := override.choice)}


def _parse(parser: Any, text: str, groups: Sequence[str]) -> Override:
    from hydra.core.override_parser.types import OverrideType
    from hydra.errors import HydraException

    where = f"command line: {text}"
    try:
        parsed = parser.parse_override(text)
    except HydraException:
        quote = "quote a value that has spaces, brackets or commas: 'key=[1, 2]'"
        hint = quote if "=" in text else f"write {text or 'KEY'}=VALUE"
        raise UserError(f"{text!r} is not an override", where=where, valid=_FORMS, hint=hint) from None
    if parsed.is_sweep_override():
        hint = "build one value at a time; quote a value that has a comma in it: 'key=\"a,b\"'"
        raise UserError(f"{text!r} gives several values; a build takes one", where=where, hint=hint)
    name = parsed.key_or_group
    if name.replace("/", ".").split(".")[0] == "hydra":
        raise UserError(f"{text!r} would configure Hydra, which is not part of a recipe", where=where, valid=_FORMS)
    is_group = name in groups
    deletes = parsed.type == OverrideType.DEL
    value = None if deletes else parsed.value()
    if is_group and not (deletes or isinstance(value, str)):
        raise UserError(f"{name} is a config group: it takes the name of a config", where=where, valid=_FORMS)
    # Forced, because the schema has keys that no file names. It refuses unknown keys later.
    force = parsed.type == OverrideType.CHANGE and not is_group
    return Override(text, parse_key(name), value, is_group, "++" + text if force else text)
