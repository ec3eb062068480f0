"""The package as a whole: no circle of imports, nothing loose at the top, and the names that it offers."""

from __future__ import annotations

from pathlib import Path

import grimp
import pytest

import furiosa_build

PACKAGE = Path(furiosa_build.__file__).parent


def strongly_connected(imports: dict[str, set[str]]) -> list[set[str]]:
    """The sets of two modules or more that import each other, directly or not."""

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        pending = [start]
        while pending:
            for imported in imports[pending.pop()] - found:
                found.add(imported)
                pending.append(imported)
        return found

    reach = {module: reachable(module) for module in imports}
    circles = {frozenset(other for other in reach[m] if m in reach[other]) for m in imports if m in reach[m]}
    return [set(circle) for circle in circles]


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = grimp.build_graph("furiosa_build", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert strongly_connected(imports) == []


@pytest.mark.parametrize(
    ("imports", "circles"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}, [{"b", "c"}]),
    ],
)
def test_circles_are_found(imports: dict[str, set[str]], circles: list[set[str]]) -> None:
    assert strongly_connected(imports) == circles


def test_only_packages_at_the_top() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "py.typed"}
    packages = [path for path in PACKAGE.rglob("*") if path.is_dir() and any(path.glob("*.py"))]
    assert [path for path in packages if not (path / "__init__.py").is_file()] == []
