"""What a step runs is in its key, to the last module of this project; what is no code is not."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from furiosa_build.plan import source_code
from furiosa_build.plan.source_code import SourceCode
from furiosa_build.steps.registry import STEPS as REGISTERED
from furiosa_build.steps.survey import Survey

from .source_tree import PACKAGE, copied_package

STEPS = ("survey", "fetch", "quantize", "shard", "trace", "compile", "package", "qualify")
ENTRIES = (
    *(f"furiosa_build.steps.{step}" for step in STEPS),
    "furiosa_build.backends.eager",
    "furiosa_build.backends.inductor.backend",
    "furiosa_build.runtime.probe",
)


SOURCE = SourceCode()


def every_import(module: str) -> set[str]:
    """The project's modules that the module names in an import statement anywhere, but for those of types only."""
    text = SOURCE.path(module).read_text()
    without_types = re.sub(r"^if TYPE_CHECKING:\n(?:(?: +.*)?\n)+", "", text, flags=re.M)
    found: set[str] = set()
    for node in ast.walk(ast.parse(without_types)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    named = {name for name in found if name.split(".")[0] == "furiosa_build"}
    parents = {".".join(name.split(".")[:depth]) for name in named for depth in range(1, name.count(".") + 2)}
    return {name for name in parents if SOURCE.path(name).is_file()}


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_closure_is_closed(entry: str) -> None:
    """Lazy imports included: every module that one of the closure names is in the closure."""
    closure = SOURCE.imported_modules((entry,))
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
        assert set(modules) <= SOURCE.imported_modules((entry,)), entry
        assert entry in modules


def test_modules_of_the_faces_are_in_no_key() -> None:
    """What only prints or orders the work does not shape an output."""
    faces = ("furiosa_build.cli", "furiosa_build.ui", "furiosa_build.build")
    assert not [name for name in SOURCE.imported_modules(ENTRIES) if name.startswith(faces)]


# An edit of the source


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Path]:
    """A copy of the package that keys are computed from."""
    with copied_package(tmp_path) as copied:
        yield copied


def digests(package: Path, memo: Path | None = None) -> dict[str, dict[str, str]]:
    """The digests of each step's code: of its own module, and of those that it says it runs besides."""
    code = SourceCode(package, memo)
    return {job.name: code.digests((type(job).__module__, *job.modules)) for job in (Survey(), *REGISTERED)}


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
    "weights/directory.py": {"fetch"},
    "weights/safetensors.py": {"fetch", *WITH_WEIGHTS},
    "quant/compressed_tensors.py": {"fetch", "quantize"},
    "steps/weights.py": WITH_WEIGHTS,
    "models/attention.py": {*WITH_GRAPHS, "qualify"},
    "backends/graph.py": {*WITH_GRAPHS, "compile"},
    "backends/ops.py": {*WITH_GRAPHS, "compile", "qualify"},
    "backends/lowering.py": set(),
    "backends/grouped_attention.py": set(),
    "steps/__init__.py": set(STEPS),
    "core/canonical_json.py": set(STEPS) - {"shard"},
}


@pytest.mark.parametrize(("file", "steps_that_run_it"), EDITS.items(), ids=EDITS)
def test_an_edited_file_changes_the_keys_of_the_steps_that_run_it(
    package: Path, file: str, steps_that_run_it: set[str]
) -> None:
    before = digests(package)
    with (package / file).open("a") as opened:
        opened.write("edited = 1\n")
    after = digests(package)
    assert {step for step in STEPS if before[step] != after[step]} == steps_that_run_it


@pytest.mark.parametrize("file", EDITS, ids=EDITS)
def test_a_comment_or_a_docstring_changes_no_key(package: Path, file: str) -> None:
    before = digests(package)
    text = (package / file).read_text()
    assert text.startswith('"""')
    (package / file).write_text("# A comment.\n" + text.replace('"""', '"""Other words. ', 1) + '\n"""A text."""\n')
    assert digests(package) == before


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
    assert "furiosa_build.core.errors" in SourceCode(package).imported_modules(("furiosa_build.core.importing",))


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
    assert "furiosa_build.core.errors" not in SourceCode(package).imported_modules(("furiosa_build.core.importing",))


def test_another_place_gives_the_same_digest(package: Path) -> None:
    assert package != PACKAGE
    assert digests(package) == digests(PACKAGE)


def test_a_new_key_of_the_recipe_quantizes_and_compiles_nothing_again(package: Path) -> None:
    before = digests(package)
    schema = package / "recipe" / "schema" / "rewriting.py"
    line = "    do_decompositions_for_model_rewrite: bool = False\n"
    text = schema.read_text()
    assert line in text
    schema.write_text(text.replace(line, line + "    a_new_key: bool = False\n"))
    after = digests(package)
    assert {step for step in STEPS if before[step] != after[step]} == {"fetch", "package"}


# The memo


@pytest.fixture
def memo(package: Path, tmp_path: Path) -> Path:
    """What is remembered of that package."""
    memo = tmp_path / "store" / "code.json"
    digests(package, memo)
    return memo


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that are parsed, as in a new process."""
    files: list[bytes] = []
    source_code.analyze.cache_clear()
    parse = ast.parse

    def noting(source: bytes) -> ast.Module:
        files.append(source)
        return parse(source)

    monkeypatch.setattr(source_code.ast, "parse", noting)
    return files


def test_what_is_remembered_is_not_parsed_again(package: Path, memo: Path, parsed: list[bytes]) -> None:
    remembered = digests(package, memo)
    assert parsed == []
    assert digests(package) == remembered
    assert parsed != []


def test_a_file_that_changes_is_parsed_again_and_no_other(package: Path, memo: Path, parsed: list[bytes]) -> None:
    before = digests(package, memo)
    file = package / "steps" / "trace.py"
    file.write_text(file.read_text() + "edited = 1\n")
    for _ in range(2):
        after = digests(package, memo)
        assert {step for step in STEPS if before[step] != after[step]} == {"trace"}
        assert parsed == [file.read_bytes()], "and the second time it is remembered"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda memo: memo.write_bytes(memo.read_bytes()[:-2]),
        lambda memo: memo.write_bytes(re.sub(rb'\["(.)', rb'["0', memo.read_bytes())),
        lambda memo: memo.write_bytes(b""),
        lambda memo: memo.write_bytes(b"\xff\n{}"),
        lambda memo: (memo.unlink(), memo.mkdir()),
        lambda memo: (memo.unlink(), memo.parent.rmdir(), memo.parent.write_text("a file")),
    ],
    ids=["cut short", "another digest", "empty", "no text", "a directory", "no directory to be in"],
)
def test_a_memo_that_is_damaged_or_cannot_be_written_is_ignored(
    package: Path, memo: Path, spoil: Callable[[Path], object], parsed: list[bytes]
) -> None:
    spoil(memo)
    assert digests(package, memo) == digests(package)
    assert parsed != []


def test_what_another_analyzer_found_is_not_taken_over(
    package: Path, memo: Path, parsed: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    digests(package, memo)
    assert parsed != []
