"""The defaults lists: which files a recipe includes, in the order in which their values win.

Hydra follows these lists itself when it composes. They are followed here first, so that a choice that does
not exist is reported with the file and line that made it, and every value can be traced to a file afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from furiosa_build.core.errors import UserError, nearest
from furiosa_build.recipe.config_files import ConfigFile, child, read_config_file

_FORMS = "`- NAME`, `- GROUP: CHOICE` or `- override GROUP: CHOICE`"


@dataclass(frozen=True)
class Choice:
    """A config chosen for a group, and where it was chosen."""

    name: str
    where: str


@dataclass(frozen=True)
class _Entry:
    """An entry of a defaults list. The empty group: a config by its own name."""

    group: str
    choice: Choice
    overrides: bool = False
    optional: bool = False


def included_files(recipe: Path, search: Sequence[Path], choices: Mapping[str, Choice]) -> list[ConfigFile]:
    """Every file that a recipe includes, in order of precedence: the first one wins.

    Args:
        recipe: The recipe's file.
        search: Directories in which configs are looked up.
        choices: What the command line chose for a group; it wins over the defaults lists.
    """
    chosen = dict(choices)

    def visit(path: Path, group: str, above: tuple[Path, ...]) -> Iterator[ConfigFile]:
        file = read_config_file(path, group)
        entries = list(_entries(file))
        if path in above:
            raise UserError(f"{path.name} includes itself", where=f"{path}: defaults")
        for entry in entries:
            if entry.overrides:  # An outer file's override wins, and outer files come first here.
                chosen.setdefault(entry.group, entry.choice)
        if not any(entry.choice.name == "_self_" for entry in entries):
            yield file
        for entry in reversed(entries):
            if entry.choice.name == "_self_":
                yield file
            elif not entry.overrides:
                includes = entry.group == group  # Another config of its own group, whatever was chosen.
                choice = entry.choice if includes else chosen.get(entry.group, entry.choice)
                if found := _look_up(entry, choice, search):
                    yield from visit(found, entry.group, (*above, path))

    for group, choice in choices.items():
        _look_up(_Entry(group, choice), choice, search)
    return list(visit(recipe, "", ()))


def chosen_groups(recipe: Path, files: Sequence[ConfigFile]) -> set[str]:
    """The groups for which a recipe, or what it includes, says more than the default: by an `override`, or itself."""
    return {entry.group for file in files for entry in _entries(file) if entry.overrides or file.path == recipe}


def groups(search: Sequence[Path]) -> list[str]:
    """The names of all config groups."""
    return sorted({path.name for directory in search for path in directory.glob("*/")})


def _entries(file: ConfigFile) -> Iterator[_Entry]:
    """The entries of a file's defaults list, except those that only Hydra can resolve."""
    node = child(file.root, "defaults")
    if node is None:
        return
    if not isinstance(node, yaml.SequenceNode):
        raise UserError("defaults is not a list", where=file.where(node), valid=f"lines of the form {_FORMS}")
    for item in node.value:
        where = file.where(item, ("defaults",))
        for words, option in _options(item, where):
            group, _, name = (f"{words[-1]}/{option}" if words[-1] else option).rpartition("/")
            if ".." in f"{group}/{name}".split("/"):
                raise UserError(f"{option!r} leads out of the conf directory", where=where, valid=_FORMS)
            group = group.strip("/") if group.startswith("/") else f"{file.group}/{group}".strip("/")
            if not set("@$") & set(group + name):  # A package, an interpolation.
                yield _Entry(group, Choice(name, where), "override" in words, "optional" in words)


def _options(item: yaml.Node, where: str) -> list[tuple[list[str], str]]:
    """An entry's words before the colon, the group last, with each config after it."""
    if isinstance(item, yaml.ScalarNode):
        return [([""], item.value)]
    if isinstance(item, yaml.MappingNode) and len(item.value) == 1:
        name, value = item.value[0]
        options = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if all(isinstance(option, yaml.ScalarNode) for option in options):
            words = name.value.split()
            return [(words, option.value) for option in options if words and not option.tag.endswith(":null")]
    raise UserError("this is not an entry of a defaults list", where=where, valid=_FORMS)


def _look_up(entry: _Entry, choice: Choice, search: Sequence[Path]) -> Path | None:
    """The file of a choice; the user's directory comes first. None: an optional entry that does not exist."""
    name = choice.name.removesuffix(".yaml")
    for directory in search:
        if (path := directory / entry.group / f"{name}.yaml").is_file():
            return path
    if entry.optional:
        return None
    if any((directory / entry.group).is_dir() for directory in search):
        known = sorted({path.stem for directory in search for path in (directory / entry.group).glob("*.yaml")})
        what = f"there is no {entry.group or 'config'} {name!r}"
    else:
        name, known = entry.group, groups(search)
        what = f"there is no config group {name!r}"
    raise UserError(what, where=choice.where, valid=", ".join(known), hint=nearest(name, known))
