"""What determines a step: its key is the digest of everything its output depends on, and of nothing else.

No path, no time, no host name. What a step runs is part of the key: the digest of its module's code and of the code of
all modules of this project that it imports, wherever in a file the import stands. Comments and docstrings are not code.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from furiosa_build.core.canonical_json import digest

_PACKAGE = Path(__file__).resolve().parent.parent


def key_factors(
    step: str,
    reads: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, str]],
    tools: Mapping[str, str],
    modules: Iterable[str],
) -> dict[str, Any]:
    """All that determines a step's output, as plain data.

    Args:
        step: Kind of step.
        reads: What it reads of the BuildSpec and the outline.
        inputs: sha256 of the files it consumes, by the step that made them.
        tools: Versions of the tools that shape its output.
        modules: The project's modules that it runs.
    """
    return {
        "step": step,
        "reads": dict(reads),
        "inputs": {step: dict(files) for step, files in inputs.items()},
        "tools": dict(tools),
        "source": source_digests(modules),
    }


def key_of(factors: Mapping[str, Any]) -> str:
    """The key: sha256 (hex) of the factors."""
    return digest(factors)


def tool_versions(*packages: str) -> dict[str, str]:
    """Installed versions, by package, without importing them."""
    return {package: version(package) for package in packages}


def source_digests(modules: Iterable[str]) -> dict[str, str]:
    """sha256 of the code of these modules of the project and of all that they import of it, directly or not."""
    # The package itself holds the version: a release is no reason to build everything again.
    names = imported_modules(tuple(modules)) - {"furiosa_build"}
    return {name: _code_digest(name) for name in sorted(names)}


@cache
def imported_modules(modules: tuple[str, ...]) -> frozenset[str]:
    """The closure of `modules` under imports within the project."""
    found: set[str] = set()
    pending = list(modules)
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += [*_direct_imports(name), name.rpartition(".")[0] or name]  # Importing runs the package too.
    return frozenset(found)


@cache
def _direct_imports(module: str) -> frozenset[str]:
    """Those that are modules of this project, and their packages' names as they are imported from."""
    found = {name for node in _run_nodes(_tree(module)) for name in _named(node, module)}
    return frozenset(name for name in found if name.split(".")[0] == _PACKAGE.name and _source(name).is_file())


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


def _named(node: ast.AST, module: str) -> Iterator[str]:
    """The modules that an import statement names; what is imported from a package may be one as well."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module if _source(module).name == "__init__.py" else module.rpartition(".")[0]
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*parents, *([node.module] if node.module else [])])
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def _source(module: str) -> Path:
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_source(module).read_bytes())


@cache
def _code_digest(module: str) -> str:
    """Of the code as Python's own printer writes it, without comments and texts that stand as statements."""
    tree = ast.parse(_source(module).read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [one for one in body if not _is_text(one)] or [ast.Pass()]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
