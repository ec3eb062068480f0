"""The exit statuses that docs/output.md lists, each by a command that ends with it. 130 and 143: tests/faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from user_directory import (
    UserDirectory,
    furiosa_build,
    make_built_directory,
    make_user_directory,
    steps_in_this_process,
)

from furiosa_build.core.errors import BuildError, PreflightError, StepError, UserError, VerificationError
from furiosa_build.core.failpoints import VARIABLE

OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "output.md"
Prepare = Callable[[UserDirectory, pytest.MonkeyPatch], None]


@pytest.fixture(autouse=True, scope="module")
def _in_this_process() -> Iterator[None]:
    with steps_in_this_process():
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory in which the recipe has been built. Not to be changed."""
    return make_built_directory(tmp_path_factory.mktemp("status"))


@pytest.fixture
def fresh(tmp_path: Path, built: UserDirectory) -> UserDirectory:
    """A directory in which nothing has been built."""
    return make_user_directory(tmp_path / "user", tmp_path / "store", built.root / "tiny")


def nothing(user: UserDirectory, patch: pytest.MonkeyPatch) -> None:
    """Leaves all as it is."""


def a_full_disk(user: UserDirectory, patch: pytest.MonkeyPatch) -> None:
    """In the midst of a step."""
    user.build()
    patch.setenv(VARIABLE, "quantize@mid-write=errno:ENOSPC")


def a_damaged_artifact(user: UserDirectory, _: pytest.MonkeyPatch) -> None:
    """One byte of a program is another."""
    user.build()
    program = next((user.artifacts / "latest" / "programs").iterdir()).resolve()
    content = program.read_bytes()
    program.unlink()
    program.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def a_damaged_store(user: UserDirectory, _: pytest.MonkeyPatch) -> None:
    """A blob is shorter."""
    user.build()
    blob = next(user.store.glob("blobs/*/*"))
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1])


TABLE: list[tuple[int, Prepare, list[str], str]] = [
    (0, nothing, ["build", "tiny"], ""),
    (0, nothing, ["plan", "tiny", "target.memory_gb=0.00001"], ""),
    (0, nothing, ["explain", "tiny"], ""),
    (2, nothing, ["build", "tinny"], "there is no recipe 'tinny'"),
    (2, nothing, ["plan", "tiny", "modle=1"], "unknown key modle"),
    (2, nothing, ["explain", "tiny", "quantization.scheme=int9"], "int9"),
    (2, nothing, ["build", "tiny", "buckets.decode_buckets=[[0,1]]"], "decode_buckets"),
    (2, nothing, ["verify", "nowhere"], "nowhere"),
    (2, nothing, ["inspect", "nowhere"], "nowhere"),
    (2, nothing, ["generate", "nowhere", "--prompt", "x"], "nowhere"),
    (2, nothing, ["cache", "gc", "--max-size", "much"], "much"),
    (2, nothing, ["--nonsense"], "--nonsense"),
    (3, a_full_disk, ["build", "tiny", "quantization=int8"], "step quantize failed: OSError: [Errno 28]"),
    (4, nothing, ["build", "tiny", "target.memory_gb=0.00001"], "needed"),
    (5, a_damaged_artifact, ["verify", "artifacts/tiny/latest"], "programs/"),
    (5, a_damaged_store, ["cache", "verify"], "is damaged"),
]


@pytest.mark.parametrize(
    ("status", "prepare", "arguments", "words"), TABLE, ids=[f"{row[0]} {' '.join(row[2])}" for row in TABLE]
)
def test_a_command_ends_with_its_status_and_one_message(
    fresh: UserDirectory,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    prepare: Prepare,
    arguments: list[str],
    words: str,
) -> None:
    prepare(fresh, monkeypatch)
    ran = furiosa_build(fresh, *arguments)
    assert ran.status == status
    assert "Traceback" not in ran.out + ran.err
    assert words in ran.err
    assert bool(ran.err) == (status != 0)


def test_a_refused_build_has_written_nothing(fresh: UserDirectory) -> None:
    furiosa_build(fresh, "plan", "tiny")  # surveys the model
    before = {path for path in fresh.root.parent.rglob("*") if path.is_file()}
    assert furiosa_build(fresh, "build", "tiny", "target.memory_gb=0.00001").status == 4
    assert furiosa_build(fresh, "build", "tiny", "scheduler.spare_blocks_ratio=2").status == 2
    assert {path for path in fresh.root.parent.rglob("*") if path.is_file()} == before


def test_the_document_lists_them_all() -> None:
    errors: list[type[BuildError]] = [UserError, StepError, PreflightError, VerificationError]
    assert [error.exit_status for error in errors] == [2, 3, 4, 5]
    table = OUTPUT.read_text().split("| exit status | | for example |\n|---|---|---|\n")[1].split("\n\n")[0]
    assert [line.split("|")[1].strip() for line in table.splitlines()] == ["0", "2", "3", "4", "5", "130, 143"]
