"""The documents say what is true: their examples run, their commands parse, every module and link is there."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from user_directory import steps_in_this_process

import furiosa_build
from furiosa_build.build import artifact_builder
from furiosa_build.cli import furiosa_llm, main
from furiosa_build.core.errors import UserError
from furiosa_build.recipe.compose import load_recipe

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block: the file and line where it begins, its language, its text."""

    where: str
    language: str
    text: str


def blocks(document: Path) -> Iterator[Block]:
    text = document.read_text()
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(f"{document.name}:{line}", match[1], match[2])


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]


# Python


PYTHON = [block for block in BLOCKS if block.language == "python" and "from furiosa_build" in block.text]


class EagerBuilder(artifact_builder.ArtifactBuilder):
    """Compiling by inductor would take minutes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, backend="eager")


@pytest.fixture
def quickstart(tmp_path: Path, build_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A directory with the quickstart's artifact and its model, as a reader has them; it is the current directory."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "artifacts" / "quickstart").mkdir(parents=True)
    artifact = build_artifact(ROOT / "examples" / "quickstart" / "model")
    (tmp_path / "artifacts" / "quickstart" / "latest").symlink_to(artifact)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FURIOSA_BUILD_CACHE", str(tmp_path / "store"))
    monkeypatch.setattr(artifact_builder, "ArtifactBuilder", EagerBuilder)
    monkeypatch.setattr(sys, "argv", ["example.py", "--model", "artifacts/quickstart/latest"])
    with steps_in_this_process():
        yield


@pytest.mark.usefixtures("quickstart")
@pytest.mark.parametrize("block", PYTHON, ids=[block.where for block in PYTHON])
def test_an_example_in_python_runs(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    code = compile(block.text, block.where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, {})
    if inspect.isawaitable(result):
        asyncio.run(wait_for(result))
    assert capsys.readouterr().out or "print(" not in block.text


async def wait_for(result: Any) -> None:
    await result


def test_there_are_examples_in_python() -> None:
    assert {block.where.split(":")[0] for block in PYTHON} == {"README.md", "python.md", "runtime.md"}


# Recipes


NAMED = {m[1]: block for block in BLOCKS if (m := re.match(r"# ((?:recipes|conf)/\S+\.yaml)\n", block.text))}


@pytest.mark.parametrize("file", [name for name in NAMED if name.startswith("recipes/")])
def test_an_example_of_a_recipe_is_composed(file: str, tmp_path: Path) -> None:
    for name, block in NAMED.items():
        if not (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(block.text.split("\n", 1)[1])
    load_recipe(Path(file).stem, cwd=tmp_path)


@pytest.mark.parametrize("document", ["README.md", "docs/recipes.md"])
def test_a_shipped_recipe_is_quoted_as_it_is(document: str) -> None:
    assert (ROOT / "recipes" / "llama3-8b-fp8.yaml").read_text() in (ROOT / document).read_text()


def test_a_mistake_reads_as_the_readme_shows() -> None:
    shown = next(block.text for block in blocks(ROOT / "README.md") if "error:" in block.text)
    command, message = shown.split("\n", 1)
    _, _, _, name, override = shlex.split(command)
    with pytest.raises(UserError) as caught:
        load_recipe(name, [override], cwd=ROOT)
    assert f"error: {caught.value}\n" == message


# Commands


def commands() -> Iterator[Any]:
    """Every command of ours in a block, named by where it stands."""
    for block in BLOCKS:
        for line in block.text.replace("\\\n", "").splitlines() if block.language in ("", "console") else []:
            if found := re.match(r"(?:\$ )?(?:\.venv/bin/)?((?:furiosa-build|furiosa-llm|make) .*)", line):
                yield pytest.param(shlex.split(found[1], comments=True), id=f"{block.where} {found[1]}")


@pytest.mark.parametrize("command", list(commands()))
def test_a_command_parses_and_its_recipe_is_composed(command: list[str]) -> None:
    program, *arguments = command
    if program == "make":
        assert set(arguments) <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
        return
    parsed: Any = typer.main.get_command(furiosa_llm.app if program == "furiosa-llm" else main.app)
    while hasattr(parsed, "commands"):
        parsed = parsed.commands[arguments.pop(0)]
    context = parsed.make_context(program, arguments)
    recipe, overrides = context.params.get("name"), context.params.get("overrides") or []
    if program == "furiosa-build" and recipe and "quantization=int9" not in overrides:  # the mistake that is shown
        load_recipe(recipe, list(overrides), cwd=ROOT)


# Modules and links


def test_every_module_stands_in_the_architecture_once() -> None:
    package = Path(furiosa_build.__file__).parent
    files = (path.relative_to(package).with_suffix("").as_posix() for path in package.rglob("*.py"))
    modules = [name for name in files if Path(name).name != "__init__"]
    section = (ROOT / "docs" / "architecture.md").read_text().split("## The modules\n")[1].split("\n## ")[0]
    told = Counter(re.findall(r"^\| `([\w/]+)` \|", section, flags=re.M))
    assert sorted(told) == sorted(modules)
    assert [name for name, count in told.items() if count > 1] == []


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=[document.name for document in DOCUMENTS])
def test_a_link_leads_somewhere(document: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.M)
            assert heading in map(anchor, headings), target
