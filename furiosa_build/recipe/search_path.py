"""The YAML files that a recipe is made of, as YAML nodes: which file says what, where and in which words.

Hydra composes the values. This module knows what Hydra forgets: where one came from and how it was spelled.
It also finds the mistakes that are plain in the files before Hydra sees them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from furiosa_build.core.errors import UserError

Key = tuple[str | int, ...]
"""The way to a value from the top of a recipe: ``("buckets", "prefill_buckets", 0)``."""

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
class Source:
    """One file. Its top is the key `group` of the recipe (the empty group: the recipe's own top)."""

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


def read_source(path: Path, group: str = "") -> Source:
    """Read one file, or say what is wrong with it."""
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
    if root is None and group:  # A choice may say nothing.
        root = yaml.MappingNode("tag:yaml.org,2002:map", [], yaml.Mark(str(path), 0, 0, 0, None, None))
    if not isinstance(root, yaml.MappingNode):
        found = {type(None): "empty", yaml.SequenceNode: "a list"}.get(type(root), "a single value")
        valid = "a mapping: lines of the form `key: value`"
        raise UserError(f"{path.name} is {found}", where=str(path), valid=valid)
    source = Source(path, group, root)
    _check(source)
    return source


def plain_text(node: yaml.Node) -> str:
    """What stands in the file, of a single value without quotes; else nothing."""
    return node.value if isinstance(node, yaml.ScalarNode) and not node.style else ""


def child(node: yaml.Node | None, part: str | int) -> yaml.Node | None:
    """What a mapping has under a key, or a list under an index."""
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


def _check(source: Source) -> None:
    """Refuse what YAML reads in silence as something else: keys written twice, and numbers as in YAML 1.1."""
    seen: set[int] = set()
    todo: list[tuple[yaml.Node, Key]] = [(source.root, parse_key(source.group.replace("/", ".")))]
    while todo:
        node, key = todo.pop()
        if id(node) in seen:  # An alias may lead back to its anchor.
            continue
        seen.add(id(node))
        if node.tag.removeprefix(_STANDARD) not in _TAGS:
            hint = "a recipe has texts, numbers, lists and mappings; quote a text that begins with !"
            raise UserError(f"unknown YAML tag {node.tag}", where=source.where(node, key), hint=hint)
        if isinstance(node, yaml.MappingNode):
            _check_keys(source, node, key)
            todo += [(value, (*key, str(name.value))) for name, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            todo += [(value, (*key, index)) for index, value in enumerate(node.value)]
        else:
            _refuse_odd_number(source, node, key)


def _check_keys(source: Source, node: yaml.MappingNode, key: Key) -> None:
    lines: dict[str, int] = {}
    for name, _ in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise UserError("a key is a list or a mapping", where=source.where(name), valid="a word")
        if name.value in lines:
            what = f"{dotted((*key, name.value))} is written twice, first on line {lines[name.value]}"
            raise UserError(what, where=source.where(name), hint="remove one of them")
        lines[name.value] = name.start_mark.line + 1


def _refuse_odd_number(source: Source, node: yaml.ScalarNode, key: Key) -> None:
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
    raise UserError(what, where=source.where(node, key), hint=hint)
