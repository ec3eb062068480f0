"""The graph as doit tasks: what `doit` prints, runs and ends with, in processes of its own and in this one."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from user_directory import UserDirectory, make_built_directory, make_user_directory, steps_in_this_process

from furiosa_build.build import graph
from furiosa_build.build.build import Build
from furiosa_build.build.publish import Publication
from furiosa_build.core.errors import StepError, UserError
from furiosa_build.ui.console import ConsoleLines, error_lines

REPOSITORY = Path(graph.__file__).resolve().parents[2]
SCRIPT = """
import multiprocessing, sys
import doit.__main__
sys.argv[0] = "doit"
try:
    doit.__main__.main()
finally:
    heavy = {"torch", "transformers", "furiosa_build.models"} & set(sys.modules)
    print("imported:", sorted(heavy), "workers:", multiprocessing.active_children(), file=sys.stderr)
"""
LIGHT = "imported: [] workers: []\n"
"""What is told at the end of a run that imported nothing heavy and left no worker behind."""

STEPS = [
    "fetch",
    "quantize",
    "partition:weights",
    *(
        f"{step}:{bucket}:{kind}"
        for bucket in ("prefill-1x32", "decode-2x64")
        for kind in ("first", "block", "last")
        for step in ("partition", "compile")
    ),
    "package",
    "qualify",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory in which the recipe has been built."""
    return make_built_directory(tmp_path_factory.mktemp("dodo"))


@pytest.fixture
def fresh(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """A directory in which nothing has been built."""
    return make_user_directory(tmp_path / "user", tmp_path / "store", built.root / "tiny")


def doit(user: UserDirectory, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`doit` in the user's directory, with the settings that it has in the repository."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["doit"]
    assert settings == {"dodoFile": "furiosa_build/cli/dodo.py", "cwdPath": "."}
    absolute = (REPOSITORY / settings["dodoFile"]).as_posix()
    (user.root / "pyproject.toml").write_text(f'[tool.doit]\ndodoFile = "{absolute}"\ncwdPath = "."\n')
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=user.root,
        env={**os.environ, "FURIOSA_BUILD_CACHE": str(user.store)},
        capture_output=True,
        text=True,
        check=False,
    )


def listing(directory: Path) -> list[Path]:
    """All files, but the one that `doit` above needs."""
    return sorted(set(directory.rglob("*")) - {directory / "pyproject.toml"})


# In processes of its own


def test_a_first_build_runs_every_step_in_workers_and_ends_them(fresh: UserDirectory) -> None:
    ran = doit(fresh, "build", "recipe=tiny")
    assert (ran.returncode, ran.stderr) == (0, LIGHT)
    without_tokenizer, *steps, artifact, qualified, report, summary = ran.stdout.splitlines()
    assert without_tokenizer.startswith("no tokenizer, ")
    assert sorted(line.split("]")[1].split()[0] for line in steps) == sorted(STEPS)
    assert [line.split("]")[0].replace(" ", "") for line in steps] == [f"[{n}/17" for n in range(1, 18)]
    assert artifact.startswith("artifact   artifacts/tiny/")
    assert "top-1 agreement 100%" in qualified
    assert report.endswith(".build-report.html")
    assert summary.startswith("ran 17 of 17 steps in ")
    assert sorted(path.name for path in fresh.root.iterdir()) == ["artifacts", "pyproject.toml", "recipes", "tiny"]
    assert not list((fresh.store / "sessions").glob("*"))
    assert not list((fresh.store / "logs").iterdir()), "logs are kept of steps that fail"
    fresh.latest()


def test_a_second_build_runs_nothing_and_imports_nothing_heavy(built: UserDirectory) -> None:
    before = listing(built.root)
    ran = doit(built, "build", "recipe=tiny")
    assert (ran.returncode, ran.stderr) == (0, LIGHT)
    artifact, _, summary = ran.stdout.splitlines()
    assert artifact.startswith("artifact   artifacts/tiny/")
    assert summary.startswith("ran 0 of 17 steps in ")
    assert summary.endswith(" s, 17 up to date")
    assert listing(built.root) == before


def test_explain_runs_nothing_and_imports_nothing_heavy(built: UserDirectory) -> None:
    before = listing(built.root)
    ran = doit(built, "explain", "recipe=tiny")
    assert (ran.returncode, ran.stderr) == (0, LIGHT)
    assert "quantize" in ran.stdout
    ran = doit(built, "explain", "recipe=tiny", "quantization=int8")
    assert (ran.returncode, ran.stderr) == (0, LIGHT)
    assert "int8" in ran.stdout
    assert listing(built.root) == before


def test_the_default_task_is_build(built: UserDirectory) -> None:
    ran = doit(built, "run", "recipe=tiny")
    assert ran.returncode == 0
    assert "17 up to date" in ran.stdout


def test_list_shows_a_task_a_step_with_a_line_each(built: UserDirectory) -> None:
    ran = doit(built, "list", "--all", "recipe=tiny")
    assert (ran.returncode, ran.stderr) == (0, LIGHT)
    described = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines())
    assert sorted(described) == sorted([*STEPS, "partition", "compile", "explain", "build"])
    assert all(described.values())
    assert described["build"] == "build artifact tiny: all of these steps"


def test_one_step_can_be_asked_for(built: UserDirectory) -> None:
    ran = doit(built, "run", "partition:weights", "recipe=tiny")
    assert ran.returncode == 0
    assert ran.stdout.endswith("3 up to date\n")


def test_overrides_are_hydras(built: UserDirectory) -> None:
    ran = doit(built, "list", "--all", "recipe=tiny", "+buckets.decode_buckets=[[1,64],[3,64]]", "name=other")
    assert ran.returncode == 0
    assert "compile:decode-3x64:block" in ran.stdout
    assert "build artifact other" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["build"], 2, ["which recipe? doit build recipe=NAME", "quickstart", "tiny                    A tiny model"]),
        (["build", "recipe=tinny"], 2, ["there is no recipe 'tinny'", "valid: ", "did you mean 'tiny'?"]),
        (["build", "recipe=tiny", "modle.revision=1"], 2, ["unknown key modle", "did you mean 'model'?"]),
        (["build", "recipe=tiny", "nokey=1"], 2, ["unknown key nokey"]),
        (["build", "recipe=tiny", "quantization.scheme=int9"], 2, ["int9", "quantization.scheme"]),
        (["build", "recipe=tiny", "quantization=int8", "target.memory_gb=0.00001"], 4, ["needed"]),
        (["build", "recipe=tiny", "save_dir=/proc/not/there"], 3, ["step package failed: FileNotFoundError"]),
    ],
    ids=["no recipe", "unknown recipe", "unknown key", "key of no section", "bad value", "too large", "failing step"],
)
def test_errors_are_one_message_and_a_status(
    built: UserDirectory, arguments: list[str], status: int, words: list[str]
) -> None:
    before = listing(built.root)
    ran = doit(built, *arguments)
    assert ran.returncode == status
    message = ran.stderr.removesuffix(LIGHT)
    assert message.startswith("error: ")
    assert message.count("error: ") == 1
    assert [word for word in words if word not in message] == []
    assert "Traceback" not in ran.stdout + ran.stderr
    assert listing(built.root) == before


@pytest.mark.parametrize("arguments", [["buidl"], ["run", "quantise"], ["--nonsense"]], ids=" ".join)
def test_a_task_that_doit_does_not_know_is_doits_to_refuse(built: UserDirectory, arguments: list[str]) -> None:
    """With 3: doit ends so before it asks anything of this project. The message is one, and nothing has run."""
    before = listing(built.root)
    ran = doit(built, *arguments, "recipe=tiny")
    assert ran.returncode == 3
    assert ran.stderr.startswith("ERROR: ")
    assert ran.stderr.count("ERROR: ") == 1
    assert arguments[-1].lstrip("-") in ran.stderr
    assert "Traceback" not in ran.stdout + ran.stderr
    assert listing(built.root) == before


def test_the_repository_is_set_up_for_doit() -> None:
    """In its root, `doit build` alone finds the graph through pyproject.toml, and asks for a recipe."""
    before = sorted(REPOSITORY.iterdir())
    command = [sys.executable, "-m", "doit", "build"]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: which recipe? doit build recipe=NAME [key=value ...]\n  there are:\n")
    assert sorted(REPOSITORY.iterdir()) == before


# In this process


@pytest.fixture
def user(fresh: UserDirectory) -> Iterator[UserDirectory]:
    with steps_in_this_process():
        yield fresh


def run(build: Build) -> int:
    """Builds, and prints what a command prints; returns the exit status."""
    build.events.listeners += [ConsoleLines(), error_lines()]
    return graph.run(build)


def test_run_orders_the_steps_and_tells_of_each(user: UserDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(user.open()) == 0
    out = capsys.readouterr().out
    done = [line.split("]")[1].split()[0] for line in out.splitlines() if line.startswith("[")]
    assert sorted(done) == sorted(STEPS)
    needs = {name: step.needs for name, step in user.open().plan.steps.items()}
    assert all(done.index(needed) < done.index(name) for name in STEPS for needed in needs[name])
    assert "17 of 17 steps" in out


def test_published_again_says_so(user: UserDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    user.build()
    (user.artifacts / "latest").unlink()
    assert run(user.open()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["[17/17]", "qualify", "found", "in", "the", "store,", "published", "again"]
    assert lines[-1].startswith("ran 0 of 17 steps")


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("bad weights", where="here"), 2), (StepError("quantize", "why", "log"), 3)]
)
def test_the_error_of_a_step_is_the_last_thing_said(
    user: UserDirectory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: UserError | StepError,
    status: int,
) -> None:
    monkeypatch.setattr("furiosa_build.steps.quantize.Quantize.run", Mock(side_effect=error))
    build = user.open()
    assert run(build) == status
    said = capsys.readouterr()
    assert said.err == f"error: {error}\n"
    _, *ran, last = said.out.splitlines()
    assert all(line.startswith("[") for line in ran)
    assert last == f"{len(ran)} steps ran, kept in the store; the next build goes on from there"
    assert "fetch" in build.outcomes
    assert not user.artifacts.exists()


def test_an_error_of_this_program_shows_where_it_comes_from(
    user: UserDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And ends with the status of a step that failed, not with that of bad input."""
    monkeypatch.setattr(Publication, "publish", Mock(side_effect=AssertionError("a bug")))
    assert run(user.open()) == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("AssertionError: a bug\nerror: step package failed: AssertionError: a bug\n")


@pytest.mark.grid
def test_a_terminal_shows_one_progress_bar(fresh: UserDirectory) -> None:
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from furiosa_build.cli.main import main; main()", "build", "tiny"],
        cwd=fresh.root,
        env={**os.environ, "FURIOSA_BUILD_CACHE": str(fresh.store), "TERM": "xterm", "COLUMNS": "120"},
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    kill = threading.Timer(120, process.kill)  # a deadlock is a failure, not a wait
    kill.start()
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other side has closed it
        while chunk := os.read(master, 1 << 16):
            shown += chunk
    os.close(master)
    status = process.wait()
    kill.cancel()
    assert status == 0, shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    counts = [int(count) for count in re.findall(r"(\d+)/17 steps +\d:\d\d:\d\d", plain)]
    assert counts == sorted(counts), "a second bar would begin at nought again"
    assert counts[-1] == 17
    assert "ran 17 of 17 steps" in plain
