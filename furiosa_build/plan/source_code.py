"""The code that steps run: which modules of this project a step imports, and the digest of each one's code.

Imports count wherever in a file they stand. Comments and docstrings are not code.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, cached_property
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

from furiosa_build.core.canonical_json import canonical_json

PACKAGE = Path(__file__).resolve().parent.parent

_MOST_REMEMBERED = 4096
"""Files; a memo that has grown beyond it is begun anew."""


class Analysis(NamedTuple):
    """The digest of a file's code, and the names that it imports as they are written: `a.b`, `..c`."""

    digest: str
    imports: tuple[str, ...]


class SourceCode:
    """The project's source, each file as it is when it is first asked for.

    Args:
        package: The project's directory; by default the one that runs.
        memo: A file that remembers, by the digest of a source file, what parsing it has found: to parse a hundred files
            takes longer than all else that a build does when there is nothing to do. One that is damaged or cannot be
            written is ignored.
    """

    def __init__(self, package: Path | None = None, memo: Path | None = None) -> None:
        self._package = package or PACKAGE
        self._memo = memo
        self._known: dict[str, Analysis] | None = None
        self._memo_grew = False
        self._of_modules: dict[str, Analysis] = {}
        self._imports: dict[str, list[str]] = {}
        self._closures: dict[tuple[str, ...], frozenset[str]] = {}

    def digests(self, modules: Iterable[str]) -> dict[str, str]:
        """sha256 of the code of `modules` and of all that they import of this project, directly or not."""
        # The package itself holds the version: a release is no reason to build everything again.
        names = self.imported_modules(modules) - {self._package.name}
        return {name: self._analysis(name).digest for name in sorted(names)}

    def imported_modules(self, modules: Iterable[str]) -> frozenset[str]:
        """The closure of `modules` under imports within the project."""
        asked = tuple(modules)
        if asked not in self._closures:
            found: set[str] = set()
            pending = list(asked)
            while pending:
                name = pending.pop()
                if name not in found:
                    found.add(name)
                    # Importing a module runs its package too.
                    pending += [*self._direct_imports(name), name.rpartition(".")[0] or name]
            self._closures[asked] = frozenset(found)
            self._write_memo()
        return self._closures[asked]

    def path(self, module: str) -> Path:
        """The file of a module, or where it would be."""
        path = self._package.joinpath(*module.split(".")[1:])
        return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")

    def _direct_imports(self, module: str) -> list[str]:
        if module not in self._imports:
            package = module if self.path(module).name == "__init__.py" else module.rpartition(".")[0]
            named = (resolve_name(name, package) for name in self._analysis(module).imports)
            self._imports[module] = [name for name in named if name in self._modules]
        return self._imports[module]

    @cached_property
    def _modules(self) -> frozenset[str]:
        """The names of the project's modules."""
        found = set()
        for directory, _, files in os.walk(self._package):
            inside = directory.removeprefix(str(self._package)).replace(os.sep, ".")
            names = (file.removesuffix(".py") for file in files if file.endswith(".py"))
            found |= {f"{self._package.name}{inside}" + ("" if name == "__init__" else f".{name}") for name in names}
        return frozenset(found)

    def _analysis(self, module: str) -> Analysis:
        if module not in self._of_modules:
            source = self.path(module).read_bytes()
            known, sha256 = self._remembered(), hashlib.sha256(source).hexdigest()
            if sha256 not in known:
                known[sha256] = analyze(source)
                self._memo_grew = True
            self._of_modules[module] = known[sha256]
        return self._of_modules[module]

    # The memo: a line with the digest of the rest, which is canonical JSON.

    def _remembered(self) -> dict[str, Analysis]:
        if self._known is None:
            self._known = {}
            with suppress(OSError, ValueError, TypeError):
                seal, _, data = (self._memo.read_bytes() if self._memo else b"").partition(b"\n")
                if seal == _seal(data):
                    found = json.loads(data)
                    self._known = {sha256: Analysis(digest, tuple(names)) for sha256, (digest, names) in found.items()}
        return self._known

    def _write_memo(self) -> None:
        if self._memo is None or not self._memo_grew:
            return
        self._memo_grew = False
        known = self._remembered()
        kept = known if len(known) <= _MOST_REMEMBERED else {}
        data = canonical_json(kept)
        new = self._memo.with_name(f".{self._memo.name}.new")  # if two write it at once, the seal is wrong
        try:
            self._memo.parent.mkdir(parents=True, exist_ok=True)
            new.write_bytes(_seal(data) + b"\n" + data)
            new.replace(self._memo)
        except OSError:  # it is parsed again the next time
            with suppress(OSError):
                new.unlink(missing_ok=True)


def _seal(data: bytes) -> bytes:
    """What another version of Python or of this file has found is not taken over."""
    analyzer = f"{sys.version_info[:3]} {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
    return hashlib.sha256(analyzer.encode() + data).hexdigest().encode()


@cache
def analyze(source: bytes) -> Analysis:
    """Parses a file."""
    tree = ast.parse(source)
    imports = sorted({name for node in _run_nodes(tree) for name in _named(node)})
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _is_text(one)] or [ast.Pass()]  # type: ignore[attr-defined]
    return Analysis(hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), tuple(imports))


def _run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a syntax tree, without what stands under `if TYPE_CHECKING:`, which is never run."""
    yield node
    for field, value in ast.iter_fields(node):
        if field == "body" and isinstance(node, ast.If) and _is_type_checking(node.test):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _run_nodes(child)


def _is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def _named(node: ast.AST) -> Iterator[str]:
    """The modules that an import statement names; what is imported from a package may be one as well."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        yield base
        inside = f"{base}." if node.module else base
        yield from (f"{inside}{alias.name}" for alias in node.names)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
