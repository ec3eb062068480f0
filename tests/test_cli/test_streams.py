"""The command line beside other programs: `| head`, a closed or full standard output, other encodings, odd bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from user_directory import Ran, UserDirectory, furiosa_build, make_built_directory, make_user_directory

from furiosa_build.core.errors import UserError
from furiosa_build.core.text import argument_text

MAIN = "from furiosa_build.cli.main import main; main()"
FULL = "error: standard output cannot be written: No space left on device\n"
ODD = os.fsdecode(b"caf\xe9")
"""A name of bytes that are not UTF-8."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory in which the recipe has been built. Not to be changed."""
    return make_built_directory(tmp_path_factory.mktemp("streams"))


@pytest.fixture
def unpublished(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """The store has all of the artifact; only to put it in place is to do."""
    shutil.copytree(built.store, tmp_path / "store")
    return make_user_directory(tmp_path / "user", tmp_path / "store", built.root / "tiny")


def closed_pipe() -> int:
    """The end to write to, of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


def ran(script: str, arguments: Sequence[str] = (), stdout: str = "pipe", cwd: Path | None = None, **more: str) -> Ran:
    """A script in a process of its own. `stdout`: what it is connected to; `nobody` has read enough."""
    command, environment = [sys.executable, "-c", script, *arguments], {**os.environ, **more}
    if stdout == "closed":
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    target = {"nobody": closed_pipe, "full": lambda: os.open("/dev/full", os.O_WRONLY)}.get(stdout)
    descriptor = subprocess.PIPE if target is None else target()
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, stdout=descriptor, stderr=subprocess.PIPE, check=False, timeout=60
        )
    finally:
        if target is not None:
            os.close(descriptor)
    return Ran(done.returncode, os.fsdecode(done.stdout or b""), os.fsdecode(done.stderr))


ENDS = {"nobody": (0, ""), "full": (1, FULL), "closed": (0, "")}
"""How a command ends that prints something, and would end with 0."""


@pytest.mark.parametrize(
    ("command", "stdout"),
    [
        *(("recipes", stdout) for stdout in ENDS),
        ("plan --help", "nobody"),
        ("plan tiny", "full"),
        ("inspect artifacts/tiny/latest", "closed"),
    ],
)
def test_output_that_nobody_takes(built: UserDirectory, command: str, stdout: str) -> None:
    done = ran(MAIN, command.split(), stdout, built.root, FURIOSA_BUILD_CACHE=str(built.store))
    assert done == Ran(ENDS[stdout][0], "", ENDS[stdout][1])


@pytest.mark.parametrize(("stdout", "flag"), [("nobody", []), ("full", ["--json"]), ("closed", [])])
def test_a_build_goes_on_when_nobody_reads_its_lines(
    unpublished: UserDirectory, stdout: str, flag: list[str], artifact_id: str
) -> None:
    environment = {"FURIOSA_BUILD_CACHE": str(unpublished.store)}
    done = ran(MAIN, ["build", "tiny", *flag], stdout, unpublished.root, **environment)
    assert done == Ran(ENDS[stdout][0], "", ENDS[stdout][1])
    assert unpublished.latest().metadata.artifact_id == artifact_id


@pytest.fixture(scope="module")
def artifact_id(built: UserDirectory) -> str:
    return built.latest().metadata.artifact_id


def test_an_error_is_told_although_nobody_reads_the_rest(built: UserDirectory) -> None:
    done = ran(MAIN, ["plan", "tinny"], "full", built.root)
    assert (done.status, done.err.splitlines()[0]) == (2, "error: there is no recipe 'tinny'")


STREAMS = "import os, sys; from furiosa_build.cli import streams; "


def test_the_next_file_does_not_become_the_standard_output() -> None:
    """Where it is closed, the first file that is opened would get its number, and with it what is printed."""
    script = STREAMS + "streams.set_up(); print('text'); sys.exit(os.open('/dev/null', os.O_RDONLY))"
    assert ran(script, stdout="closed").status == 3


def test_nothing_is_lost_when_another_program_makes_the_pipe_non_blocking() -> None:
    """Node.js does so with those of its children."""
    script = STREAMS + "os.set_blocking(1, False); streams.set_up(); print('x' * 1_000_000)"
    assert len(ran(script).out) == 1_000_001


TEXTS = "print('\\xe9\\U0001f600', os.fsdecode(b'caf\\xe9'))"


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("utf-8", b"\xc3\xa9\xf0\x9f\x98\x80 caf\xe9\n"), ("ascii", b"\\xe9\\U0001f600 caf\xe9\n")],
)
def test_every_text_is_printed(encoding: str, printed: bytes) -> None:
    """What the encoding lacks is escaped, and the name of a file comes out as it is."""
    done = ran(STREAMS + f"streams.set_up(); {TEXTS}", PYTHONIOENCODING=encoding)
    assert (done.status, os.fsencode(done.out), done.err) == (0, printed, "")


def test_a_text_is_utf8_whatever_the_locale() -> None:
    """In the locale C, Python takes the bytes beyond ASCII for no text."""
    script = STREAMS + "from furiosa_build.core.text import argument_text; print(ascii(argument_text(sys.argv[1])))"
    done = ran(script, ["\xe9\U0001f600"], LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.out == "'\\xe9\\U0001f600'\n"
    with pytest.raises(UserError, match=r"'caf\\udce9' is not UTF-8: byte 0xe9 at offset 3"):
        argument_text(ODD)


@pytest.mark.parametrize("program", ["generate", "serve"])
def test_an_artifact_whose_path_is_no_text(built: UserDirectory, tmp_path: Path, program: str) -> None:
    odd = tmp_path / ODD
    shutil.copytree((built.artifacts / "latest").resolve(), odd)
    done = furiosa_build(built, program, str(odd), *(["--prompt", "x"] if program == "generate" else []))
    assert (done.status, done.out) == (2, "")
    assert done.err.splitlines() == [
        f"error: {str(odd)!r} is not UTF-8: byte 0xe9 at offset {len(str(odd)) - 1}",
        f"  where: {odd}",
        "  valid: a path in UTF-8",
        "  hint: safetensors and torch open no such files: rename the directory, or move them",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", ODD],
        ["plan", "tiny", f"model.model_id_or_path={ODD}"],
        ["plan", "tiny", f'model.model_id_or_path="{ODD}"'],
        ["build", "tiny", f"save_dir={ODD}"],
        ["generate", "artifacts/tiny/latest", "--prompt", ODD],
        ["generate", "artifacts/tiny/latest", "--prompt", "x", "--stop", ODD],
        ["generate", ODD, "--prompt", "x"],
        ["inspect", ODD],
        ["verify", ODD],
        ["serve", ODD],
    ],
    ids=lambda arguments: ascii(" ".join(arguments)),
)
def test_bytes_that_are_no_text_are_refused_in_one_message(built: UserDirectory, arguments: list[str]) -> None:
    done = furiosa_build(built, *arguments)
    assert done.status == 2
    assert done.err.startswith("error: ")
    assert "caf" in done.err
