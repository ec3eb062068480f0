"""What the command line changes: Hydra overrides, parsed before anything is composed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.defaults import Choice
from furiosa_build.recipe.search_path import Key, dotted, parse_key

_FORMS = "key=value, group=choice, +key=value (add), ~key (remove)"


@dataclass(frozen=True)
class Override:
    """One override. `for_hydra` is the text that Hydra gets for it."""

    text: str
    key: Key
    value: Any
    is_group: bool
    for_hydra: str

    @property
    def where(self) -> str:
        """The place, for a message."""
        return f"command line: {self.text}"

    @property
    def choice(self) -> Choice | None:
        """The config that this chooses for a group."""
        return Choice(self.value, self.where) if self.is_group and self.value is not None else None


def parse_overrides(texts: Sequence[str], groups: Sequence[str]) -> list[Override]:
    """Parse overrides of any form that Hydra knows, but for those of a multirun.

    Args:
        texts: As typed, one argument each.
        groups: The config groups there are: `group=choice` is told from `key=value` by them.
    """
    if not texts:
        return []
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    return [_parse(parser, text, groups) for text in texts]


def choices(overrides: Sequence[Override]) -> dict[str, Choice]:
    """What the overrides choose, by group."""
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
        raise UserError(f"{text!r} gives several values: one build has one", where=where, hint=hint)
    name = parsed.key_or_group
    if name.replace("/", ".").split(".")[0] == "hydra":
        raise UserError(f"{text!r} would set Hydra up: that is no part of a recipe", where=where, valid=_FORMS)
    is_group = name in groups
    deletes = parsed.type == OverrideType.DEL
    value = None if deletes else parsed.value()
    if is_group and not (deletes or isinstance(value, str)):
        raise UserError(f"{name} is a config group: it takes the name of a config", where=where, valid=_FORMS)
    # Which keys there are is for the schema to say, and it knows more of them than the files name: so force.
    force = parsed.type == OverrideType.CHANGE and not is_group
    return Override(text, parse_key(name), value, is_group, "++" + text if force else text)
