"""The fenced blocks of the documents, and a reader who runs them.

Commands stand behind `$`, with what they print below, or alone. What has neither a command nor a language is a drawing
or an excerpt. A block that cannot run here has a comment before it, with the reason: `<!-- not run: REASON -->`.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from user_directory import Ran, UserDirectory, furiosa_build, furiosa_llm

from furiosa_build.recipe.compose import load_recipe

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^(?:<!-- not run: (?P<why>[^>]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_COMMAND = re.compile(r"(?:\$ |(?:\.venv/bin/)?(?:furiosa-build|furiosa-llm|make|curl|doit) |export |PIP_)")
_FILE = re.compile(r"# ((?:recipes|conf)/\S+\.yaml)\n")


class Block(NamedTuple):
    """A fenced block: where it begins, its language, its text, and why it is not run (empty: it is)."""

    where: str
    language: str
    text: str
    why_not: str = ""


def blocks(document: Path) -> Iterator[Block]:
    """The blocks of a document, in order. Commands have the language `console`, what nothing can run `text`."""
    text = document.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        unsaid = "console" if _COMMAND.match(match["text"]) else "text"
        yield Block(f"{document.name}:{line}", match["language"] or unsaid, match["text"], match["why"] or "")


class Command(NamedTuple):
    """A command, the exit status that a comment behind it tells (None: none does), and what it prints."""

    line: str
    status: int | None
    printed: str


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block, with what is shown of their output."""
    lines = block.text.replace("\\\n", "").splitlines()
    if not any(line.startswith("$ ") for line in lines):
        lines = [f"$ {line}" for line in lines]
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        status = re.search(r"# status (\d+)$", lines[start])
        printed = "".join(f"{line}\n" for line in lines[start + 1 : end])
        yield Command(lines[start][2:], int(status[1]) if status else None, printed)


class Reader:
    """Somebody who runs what a document shows, block after block, in `user.root`."""

    def __init__(self, user: UserDirectory) -> None:
        self.user = user
        self._recipes: list[str] = []

    def run(self, block: Block) -> None:
        """Runs a block. Raises AssertionError where it does not do what it shows."""
        match block.language:
            case "python":
                self._run_python(block)
            case "yaml":
                self._compose(block.text)
            case "json":
                json.loads(block.text)
            case "console":
                for command in commands(block):
                    self._check(command)

    def end(self) -> None:
        """Composes the recipes that were shown: their parts may have stood behind them."""
        for name in self._recipes:
            load_recipe(name, cwd=self.user.root)

    def _run_python(self, block: Block) -> None:
        code, printed = compile(block.text, block.where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), io.StringIO()
        with contextlib.chdir(self.user.root), contextlib.redirect_stdout(printed):
            result = eval(code, {})
            if inspect.isawaitable(result):
                asyncio.run(_wait_for(result))
        assert printed.getvalue() or "print(" not in block.text

    def _compose(self, text: str) -> None:
        """A file, named by its first line, or a part of a recipe."""
        if named := _FILE.match(text):
            file = self.user.root / named[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text[named.end() :], encoding="utf-8")
            self._recipes += [file.stem] if file.parent.name == "recipes" else []
        else:
            shown = yaml.safe_load(text)
            recipe = shown if "defaults" in shown else {"defaults": ["quickstart"], **shown}
            (self.user.root / "recipes" / "shown.yaml").write_text("# Shown.\n" + yaml.safe_dump(recipe))
            load_recipe("shown", cwd=self.user.root)

    def _check(self, command: Command) -> None:
        ran = self._ran(command.line)
        fails = command.printed.startswith("error: ") if command.status is None else command.status != 0
        assert (ran.status != 0) == fails, (command, ran)
        assert command.status in (None, ran.status), (command, ran)
        if command.printed:
            assert re.fullmatch(pattern(command.printed), ran.err if fails else ran.out), (command, ran)

    def _ran(self, line: str) -> Ran:
        program, *arguments = shlex.split(line, comments=True)
        programs = {"furiosa-build": furiosa_build, "furiosa-llm": furiosa_llm}
        return programs[Path(program).name](self.user, *arguments)


_WILD = (
    (r"/home/me/\S*", r"\S+"),
    (r"\b(?=\w*\d)[0-9a-f]{12,64}\b", r"[0-9a-f]+"),
    (r"\s*\b\d[\d.]*(?: [kMGT]?B\b)?", r"\s*\d[\d.]*(?: [kMGT]?B)?"),
    (r"\.\.\.", r".*"),
    (r"\s+", r"\s+"),
)
"""Parts of what is shown, and what may be there in their place: paths, ids, numbers, sizes, what is left out."""


def pattern(shown: str) -> str:
    """A regular expression for output that is as shown, but for times, ids, sizes and what `...` leaves out."""
    anything = "|".join(f"({part})" for part, _ in _WILD)

    def one(match: re.Match[str]) -> str:
        return _WILD[match.lastindex - 1][1] if match.lastindex else re.escape(match[0])

    return f"(?s:{re.sub(f'{anything}|.', one, shown, flags=re.S)})"


async def _wait_for(result: Any) -> None:
    await result
