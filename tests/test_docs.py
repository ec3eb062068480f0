"""The documents say what is true: their examples run, their commands parse, every module and link is there."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from documents import DOCUMENTS, ROOT, Reader, blocks, pattern
from grid import grid
from user_directory import UserDirectory, steps_in_this_process

import furiosa_build
from furiosa_build.cli import furiosa_llm, main
from furiosa_build.recipe.compose import load_recipe

BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]


# The examples run


@pytest.fixture
def reader(tmp_path: Path, build_artifact: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    """A reader in a copy of the repository, with the quickstart's artifact."""
    for name in ("recipes", "conf", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for model in (tmp_path / "conf" / "model").glob("*.yaml"):
        if model.stem != "quickstart":  # on the hub, where the tokenizer would have to be fetched from
            model.write_text(model.read_text() + "tokenizer: none\n")
    (tmp_path / "artifacts" / "quickstart").mkdir(parents=True)
    artifact = build_artifact(ROOT / "examples" / "quickstart" / "model", backend="native")
    (tmp_path / "artifacts" / "quickstart" / "latest").symlink_to(artifact)
    monkeypatch.setenv("FURIOSA_BUILD_CACHE", str(tmp_path / "store"))
    monkeypatch.setattr(sys, "argv", ["example.py", "--model", "artifacts/quickstart/latest"])
    with steps_in_this_process():
        yield Reader(UserDirectory(tmp_path, tmp_path / "store"))


@pytest.mark.parametrize(
    "document", grid(DOCUMENTS, [each for each in DOCUMENTS if each.name != "python.md"]), ids=lambda each: each.name
)
def test_every_block_does_what_it_shows(document: Path, reader: Reader) -> None:
    """In order: a block may go on from what one before it has made."""
    for block in blocks(document):
        if not block.why_not:
            reader.run(block)
    reader.end()


def test_there_are_examples_in_python() -> None:
    documents = {block.where.split(":")[0] for block in BLOCKS if block.language == "python" and not block.why_not}
    assert documents == {"README.md", "python.md", "runtime.md"}


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("[ 1/29] fetch     0.0 s   42.5 MB\n", "[12/35] fetch  107.3 s  1 GB\n"),
        ("artifact   artifacts/x/7f88b0c6e8b4\n", "artifact   artifacts/x/0123456789ab\n"),
        ("first\n...\nlast\n", "first\nsecond\nthird\nlast\n"),
    ],
)
def test_output_is_compared_but_for_times_ids_and_sizes(shown: str, printed: str) -> None:
    assert re.fullmatch(pattern(shown), printed)
    assert not re.fullmatch(pattern(shown), printed.replace("f", "g"))


# Recipes


@pytest.mark.parametrize("document", ["README.md", "docs/recipes.md"])
def test_a_shipped_recipe_is_quoted_as_it_is(document: str) -> None:
    assert (ROOT / "recipes" / "llama3-8b-fp8.yaml").read_text() in (ROOT / document).read_text()


# Commands


def commands() -> Iterator[Any]:
    """Every command of ours in a block, named by where it stands."""
    for block in BLOCKS:
        for line in block.text.replace("\\\n", "").splitlines() if block.language == "console" else []:
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
