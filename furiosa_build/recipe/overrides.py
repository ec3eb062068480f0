"""Overrides on the command line, parsed with Hydra's parser before anything is composed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from furiosa_build.core.errors import UserError
from furiosa_build.recipe.config_files import Key, dotted, parse_key
from furiosa_build.recipe.defaults import Choice
from furiosa_build.recipe.schema import BuildSpec

_FORMS = "key=value, group=choice, +key=value (add), ~key (remove)"
_JOINED = (("devices",),)
"""Keys of a text that lists something: a list is taken as well."""


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
    def is_forced(self) -> bool:
        """Whether Hydra is told to set a key that no file names."""
        return self.for_hydra != self.text

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
    return _parse_all(texts, groups, takes_sweeps=False)


def parse_sweep(texts: Sequence[str], groups: Sequence[str]) -> list[Override]:
    """Parse overrides of a multirun: also those that give a key several values, which have none here."""
    return _parse_all(texts, groups, takes_sweeps=True)


def _parse_all(texts: Sequence[str], groups: Sequence[str], *, takes_sweeps: bool) -> list[Override]:
    if not texts:
        return []
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    return [_parse(parser, text, groups, takes_sweeps) for text in texts]


def choices(overrides: Sequence[Override]) -> dict[str, Choice]:
    """The choices that the overrides make, by group."""
    return {dotted(override.key): choice for override in overrides if (choice := override.choice)}


def quoted(key: str, text: str) -> str:
    """The override that sets a key to any text, quoted for Hydra and for the shell."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return shlex.quote(f"{key}={QuotedString(text, Quote.double).with_quotes()}")


def _parse(parser: Any, text: str, groups: Sequence[str], takes_sweeps: bool) -> Override:
    from hydra.core.override_parser.types import OverrideType, ValueType
    from hydra.errors import HydraException

    where = f"command line: {text}"
    if not text.isprintable() and any("\udc80" <= character <= "\udcff" for character in text):
        what = f"{text!r} has bytes that are not text in the encoding of this locale"
        raise UserError(what, where=where, valid="UTF-8, where the locale is of UTF-8 (LC_ALL=C.UTF-8)")
    try:
        parsed = parser.parse_override(text)
    except HydraException:
        raise UserError(f"{text!r} is not an override", where=where, valid=_FORMS, hint=_hint(parser, text)) from None
    name, is_group = parsed.key_or_group, parsed.key_or_group in groups
    key, raw = parse_key(name), text.partition("=")[2]
    is_sweep = takes_sweeps and parsed.is_sweep_override()
    if not is_sweep and parsed.value_type == ValueType.SIMPLE_CHOICE_SWEEP and not is_group and _takes_list(key):
        return Override(text, key, parser.parse_override(f"{name}=[{raw}]").value(), False, f"++{name}=[{raw}]")
    if parsed.is_sweep_override() and not is_sweep:
        hint = "build all of them with --multirun, or one value at a time"
        if parsed.value_type == ValueType.SIMPLE_CHOICE_SWEEP and not is_group:
            hint += f"; for one text with a comma in it write {quoted(name, raw)}"
        raise UserError(f"{text!r} gives several values; a build takes one", where=where, hint=hint)
    if name.replace("/", ".").split(".")[0] == "hydra":
        raise UserError(f"{text!r} would configure Hydra, which is not part of a recipe", where=where, valid=_FORMS)
    deletes = parsed.type == OverrideType.DEL
    value = None if deletes or is_sweep else parsed.value()
    if is_group and not (deletes or is_sweep or isinstance(value, str)):
        raise UserError(f"{name} is a config group: it takes the name of a config", where=where, valid=_FORMS)
    # Forced, because the schema has keys that no file names. It refuses unknown keys later.
    force = parsed.type == OverrideType.CHANGE and not is_group
    return Override(text, key, value, is_group, "++" + text if force else text)


def _hint(parser: Any, text: str) -> str:
    """What makes an override of a text that Hydra cannot parse."""
    from hydra.errors import HydraException

    key, equals, value = text.partition("=")
    if not equals:
        return f"write {text or 'KEY'}=VALUE"
    try:
        parser.parse_override(f'{key}=""')
    except HydraException:  # it is not the value that is wrong
        return f"{key!r} is not a key: that is words with dots between them, such as model.num_hidden_layers"
    as_text = f"write {quoted(key, value)}, which is quoted for the shell and for Hydra"
    if value.startswith(("[", "{")):
        return f"close every bracket, as in {shlex.quote(f'{key}=[1, 2]')}; for a text, {as_text}"
    return as_text


def _takes_list(key: Key) -> bool:
    """Whether the value of a key is a list."""
    model: Any = BuildSpec
    for part in key[:-1]:
        field = getattr(model, "model_fields", {}).get(part)
        model = None if field is None else field.annotation
    field = getattr(model, "model_fields", {}).get(key[-1]) if key else None
    return key in _JOINED or (field is not None and _is_list(field.annotation))


def _is_list(annotation: Any) -> bool:
    """Whether a type is a tuple, one with conditions, or a union with one."""
    return get_origin(annotation) is tuple or any(_is_list(part) for part in get_args(annotation))
