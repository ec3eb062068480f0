"""The YAML files that a recipe is composed of, as YAML nodes with their lines.

Hydra composes the values. This module keeps what Hydra forgets: where each came from and how it was spelled.
It also reports mistakes that can be seen in the files alone, before Hydra reads them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from furiosa_build.core.errors import UserError

Key = tuple[str | int, ...]
"""The path to a value from the top of a recipe: ``("buckets", "prefill_buckets", 0)``."""

_STANDARD = "tag:yaml.org,2002:"
_TAGS = frozenset({"str", "int", "float", "bool", "null", "map", "seq", "timestamp"})
YamlError = yaml.YAMLError
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_OCTAL = re.compile(r"[-+]?0[0-7_]+")


def dotted(key: Key) -> str:
    """A key as it is written: ``buckets.prefill_buckets[0]``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def parse_key(text: str) -> Key:
    """The reverse of `dotted`."""
    return tuple(int(part) if part.isdecimal() else part for part in re.split(r"[.\[\]]+", text) if part)


@dataclass(frozen=True)
class ConfigFile:
    """A file. Its top level is the key `group` of the recipe; with an empty group, that of the recipe itself."""

    path: Path
    group: str
    root: yaml.MappingNode

    def find(self, key: Key) -> yaml.Node | None:
        """The node that this file gives for `key`."""
        prefix = tuple(self.group.split("/")) if self.group else ()
        if key[: len(prefix)] != prefix:
            return None
        node: yaml.Node | None = self.root
        for part in key[len(prefix) :]:
            node = child(node, part)
        return node

    def where(self, node: yaml.Node, key: Key = ()) -> str:
        """File, line and key for a message."""
        return f"{self.path}:{node.start_mark.line + 1}" + (f": {dotted(key)}" if key else "")


def read_config_file(path: Path, group: str = "") -> ConfigFile:
    """Read a file. Raises UserError when it is not the YAML of a recipe."""
    try:
        text = path.read_bytes().decode()
        root = yaml.compose(text, Loader=_Loader)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path.name} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start}",
            where=str(path),
            valid="a YAML file in UTF-8",
        ) from None
    except yaml.YAMLError as error:
        raise _syntax_error(error, path, text) from None
    if root is None and group:  # A choice may be empty.
        root = yaml.MappingNode("tag:yaml.org,2002:map", [], yaml.Mark(str(path), 0, 0, 0, None, None))
    if not isinstance(root, yaml.MappingNode):
        found = {type(None): "empty", yaml.SequenceNode: "a list"}.get(type(root), "a single value")
        valid = "a mapping: lines of the form `key: value`"
        raise UserError(f"{path.name} is {found}", where=str(path), valid=valid)
    file = ConfigFile(path, group, root)
    _check(file)
    return file


def plain_text(node: yaml.Node) -> str:
    """The text of an unquoted scalar as it stands in the file; empty for any other node."""
    return node.value if isinstance(node, yaml.ScalarNode) and not node.style else ""


def child(node: yaml.Node | None, part: str | int) -> yaml.Node | None:
    """The value of a mapping at a key, or of a list at an index; None if there is none."""
    if isinstance(node, yaml.MappingNode):
        return next((value for name, value in node.value if name.value == part), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
        return next(iter(node.value[part : part + 1]), None)
    return None


def _syntax_error(error: yaml.YAMLError, path: Path, text: str) -> UserError:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    has_tab = mark and "\t" in "".join(text.splitlines()[mark.line : mark.line + 1])
    return UserError(
        f"{path.name} is not valid YAML: {problem}",
        where=f"{path}:{mark.line + 1}" if mark else str(path),
        hint="indent with spaces" if has_tab else "quote a value that has a colon, a # or a bracket in it",
    )


def _check(file: ConfigFile) -> None:
    """Refuse what YAML silently reads as something else: duplicate keys, and the numbers of YAML 1.1."""
    seen: set[int] = set()
    todo: list[tuple[yaml.Node, Key]] = [(file.root, parse_key(file.group.replace("/", ".")))]
    while todo:
        node, key = todo.pop()
        if id(node) in seen:  # An alias may lead back to its anchor.
            continue
        seen.add(id(node))
        if node.tag.removeprefix(_STANDARD) not in _TAGS:
            hint = "a recipe has texts, numbers, lists and mappings; quote a text that begins with !"
            raise UserError(f"unknown YAML tag {node.tag}", where=file.where(node, key), hint=hint)
        if isinstance(node, yaml.MappingNode):
            _check_keys(file, node, key)
            todo += [(value, (*key, str(name.value))) for name, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            todo += [(value, (*key, index)) for index, value in enumerate(node.value)]
        else:
            _refuse_odd_number(file, node, key)


def _check_keys(file: ConfigFile, node: yaml.MappingNode, key: Key) -> None:
    lines: dict[str, int] = {}
    for name, _ in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise UserError("a key is a list or a mapping", where=file.where(name), valid="a word")
        if name.value in lines:
            what = f"{dotted((*key, name.value))} is written twice, first on line {lines[name.value]}"
            raise UserError(what, where=file.where(name), hint="remove one of them")
        lines[name.value] = name.start_mark.line + 1


def _refuse_odd_number(file: ConfigFile, node: yaml.ScalarNode, key: Key) -> None:
    text = plain_text(node)
    if node.tag.removeprefix(_STANDARD) not in ("int", "float"):
        return
    if _OCTAL.fullmatch(text):
        hint = f'write {text.replace("_", "").lstrip("+-0") or 0} for a number, "{text}" for a text'
    elif ":" in text:
        hint = f'quote it: "{text}"'
    else:
        return
    what = f"{dotted(key)}: {text} is read as the number {yaml.safe_load(text)}"
    raise UserError(what, where=file.where(node, key), hint=hint)
