"""Keys are complete: what a step runs is in its key, to the last module of this project."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from furiosa_build.core.canonical_json import canonical_json
from furiosa_build.plan import keys
from furiosa_build.plan.keys import imported_modules, key_factors, key_of, tool_versions

from .source_tree import PACKAGE, copied_package, forget_sources

STEPS = ("survey", "fetch", "quantize", "shard", "trace", "compile", "package", "qualify")
ENTRIES = (
    *(f"furiosa_build.steps.{step}" for step in STEPS),
    "furiosa_build.backends.eager",
    "furiosa_build.backends.inductor.backend",
    "furiosa_build.runtime.probe",
)


def every_import(module: str) -> set[str]:
    """The project's modules that the module names in an import statement anywhere, but for those of types only."""
    text = keys._source(module).read_text()
    without_types = re.sub(r"^if TYPE_CHECKING:\n(?:(?: +.*)?\n)+", "", text, flags=re.M)
    found: set[str] = set()
    for node in ast.walk(ast.parse(without_types)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    named = {name for name in found if name.split(".")[0] == "furiosa_build"}
    parents = {".".join(name.split(".")[:depth]) for name in named for depth in range(1, name.count(".") + 2)}
    return {name for name in parents if keys._source(name).is_file()}


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_closure_is_closed(entry: str) -> None:
    """Lazy imports included: every module that one of the closure names is in the closure."""
    closure = imported_modules((entry,))
    assert entry in closure
    assert not {name for module in closure for name in every_import(module)} - closure


def test_the_closure_has_all_that_a_fresh_interpreter_imports() -> None:
    script = (
        "import importlib, json, sys\n"
        "loaded = {}\n"
        "for entry in sys.argv[1:]:\n"
        "    for name in [n for n in sys.modules if n.split('.')[0] == 'furiosa_build']:\n"
        "        del sys.modules[name]\n"
        "    importlib.import_module(entry)\n"
        "    loaded[entry] = sorted(n for n in sys.modules if n.split('.')[0] == 'furiosa_build')\n"
        "print(json.dumps(loaded))\n"
    )
    entries = [entry for entry in ENTRIES if entry != "furiosa_build.runtime.probe"]  # It imports torch.
    ran = subprocess.run([sys.executable, "-c", script, *entries], capture_output=True, text=True, check=True)
    for entry, modules in json.loads(ran.stdout).items():
        assert set(modules) <= imported_modules((entry,)), entry
        assert entry in modules


def test_modules_of_the_faces_are_in_no_key() -> None:
    """What only prints or orders the work does not shape an output."""
    faces = ("furiosa_build.cli", "furiosa_build.ui", "furiosa_build.build")
    assert not [name for name in imported_modules(ENTRIES) if name.startswith(faces)]


# An edit of the source


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Path]:
    """A copy of the package that keys are computed from."""
    with copied_package(tmp_path) as copied:
        yield copied


def source_digests() -> dict[str, dict[str, str]]:
    forget_sources()
    return {step: keys.source_digests((f"furiosa_build.steps.{step}",)) for step in STEPS}


WITH_WEIGHTS = {"quantize", "shard", "qualify"}
WITH_GRAPHS = {"survey", "trace"}
EDITS = {
    "cli/main.py": set(),
    "build/build.py": set(),
    "store/actions.py": set(),
    "steps/trace.py": {"trace"},
    "steps/package.py": {"package"},
    "steps/fetch.py": {"fetch"},
    "weights/listing.py": {"fetch", "package", *WITH_WEIGHTS},
    "quant/quantization.py": {"quantize", "shard", "qualify"},
    "steps/weights.py": WITH_WEIGHTS,
    "models/attention.py": {*WITH_GRAPHS, "qualify"},
    "backends/graph.py": {*WITH_GRAPHS, "compile"},
    "steps/__init__.py": set(STEPS),
    "core/canonical_json.py": set(STEPS) - {"shard"},
}


@pytest.mark.parametrize(("file", "steps_that_run_it"), EDITS.items(), ids=EDITS)
def test_an_edited_file_changes_the_keys_of_the_steps_that_run_it(
    package: Path, file: str, steps_that_run_it: set[str]
) -> None:
    before = source_digests()
    with (package / file).open("a") as opened:
        opened.write("edited = 1\n")
    after = source_digests()
    assert {step for step in STEPS if before[step] != after[step]} == steps_that_run_it


@pytest.mark.parametrize("file", EDITS, ids=EDITS)
def test_a_comment_or_a_docstring_changes_no_key(package: Path, file: str) -> None:
    before = source_digests()
    text = (package / file).read_text()
    assert text.startswith('"""')
    (package / file).write_text("# A comment.\n" + text.replace('"""', '"""Other words. ', 1) + '\n"""A text."""\n')
    assert source_digests() == before


@pytest.mark.parametrize(
    "text",
    [
        "import furiosa_build.core.errors",
        "import os, furiosa_build.core.errors as e",
        "from furiosa_build.core import errors",
        "from furiosa_build.core import (  # such as errors\n    text,\n    errors as e,\n)",
        "from . import errors",
        "from .errors import UserError",
        "from ..core.errors import UserError",
        "from .. import core\nfrom ..core import errors",
        "try:\n    import nothing\nexcept ImportError:\n    from .errors import UserError",
        "if x:\n    pass\nelse:\n    from .errors import UserError",
        "if TYPE_CHECKING:\n    pass\nelse:\n    from .errors import UserError",
        "def f():\n    async def g():\n        from .errors import UserError",
        "x = 1; from .errors import UserError",
        "match x:\n    case 1:\n        from .errors import UserError",
    ],
)
def test_every_form_of_import_is_found(package: Path, text: str) -> None:
    (package / "core" / "importing.py").write_text(text + "\n")
    forget_sources()
    assert "furiosa_build.core.errors" in imported_modules(("furiosa_build.core.importing",))


@pytest.mark.parametrize(
    "text",
    [
        "# from .errors import UserError",
        "'''\nfrom .errors import UserError\n'''",
        "if TYPE_CHECKING:\n    from .errors import UserError",
        "if typing.TYPE_CHECKING:\n    from .errors import UserError",
    ],
)
def test_what_is_never_run_is_no_import(package: Path, text: str) -> None:
    (package / "core" / "importing.py").write_text(text + "\n")
    forget_sources()
    assert "furiosa_build.core.errors" not in imported_modules(("furiosa_build.core.importing",))


def test_another_place_gives_the_same_digest(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = source_digests()
    monkeypatch.setattr(keys, "_PACKAGE", PACKAGE)
    assert source_digests() == copied
    assert package != PACKAGE


# Keys


def factors(**others: object) -> dict[str, object]:
    arguments: dict[str, object] = {
        "step": "test",
        "reads": {"a": 1},
        "inputs": {"fetch": {"f": "d1"}},
        "tools": {"torch": "2.13.0"},
        "modules": ["furiosa_build.core.canonical_json"],
    }
    return key_factors(**{**arguments, **others})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"step": "other"},
        {"reads": {"a": 2}},
        {"reads": {"a": 1, "b": None}},
        {"inputs": {"fetch": {"f": "d2"}}},
        {"inputs": {"quantize": {"f": "d1"}}},
        {"tools": {"torch": "2.13.1"}},
        {"modules": ["furiosa_build.core.errors"]},
    ],
)
def test_every_factor_counts(change: dict[str, object]) -> None:
    assert key_of(factors(**change)) != key_of(factors())


def test_the_order_in_which_things_are_named_does_not_count() -> None:
    modules = ["furiosa_build.core.cpu", "furiosa_build.core.canonical_json"]
    one = factors(reads={"a": 1, "b": 2}, modules=modules)
    other = factors(reads={"b": 2, "a": 1}, modules=modules[::-1])
    assert key_of(one) == key_of(other)


def test_factors_are_plain_data() -> None:
    assert json.loads(canonical_json(factors())) == factors()


def test_versions_are_those_that_are_installed() -> None:
    import pydantic

    assert tool_versions("pydantic") == {"pydantic": pydantic.VERSION}
