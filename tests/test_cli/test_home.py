"""A user without a name and without a home, as a container runs for an arbitrary user id."""

from __future__ import annotations

import pwd
from pathlib import Path
from unittest.mock import Mock

import pytest
from user_directory import UserDirectory, furiosa_build, make_new_directory

from furiosa_build.build.artifact_builder import ArtifactBuilder
from furiosa_build.core.errors import UserError
from furiosa_build.store import default_store_root


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UserDirectory:
    """The directory of one. No store is named."""
    user = make_new_directory(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", Mock(side_effect=KeyError("uid not found")))
    monkeypatch.setattr(pwd, "getpwnam", Mock(side_effect=KeyError("name not found")))
    return user


MESSAGE = (
    "error: ~/.cache/furiosa/llm: this user has no such home directory\n"
    "  where: FURIOSA_BUILD_CACHE\n"
    "  hint: set FURIOSA_BUILD_CACHE to a directory for the store\n"
)


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "tiny"],
        ["plan", "tiny"],
        ["explain", "tiny"],
        ["shard", "tiny", "--output", "shards"],
        ["serve", "tiny"],
        ["cache", "ls"],
        ["cache", "gc"],
        ["cache", "verify"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_one_message_says_what_to_set(nobody: UserDirectory, arguments: list[str]) -> None:
    ran = furiosa_build(nobody, *arguments, FURIOSA_BUILD_CACHE="")
    assert (ran.status, ran.out, ran.err) == (2, "", MESSAGE)


@pytest.mark.parametrize(
    "override", ['cache_dir="~/store"', 'save_dir="~/artifacts"', 'model.model_id_or_path="~/model"']
)
def test_a_home_that_is_named_and_not_there(nobody: UserDirectory, override: str) -> None:
    ran = furiosa_build(nobody, "plan", "tiny", override)
    assert ran.status == 2
    assert "this user has no such home directory" in ran.err


def test_of_another_user() -> None:
    with pytest.raises(UserError, match="~nobody-of-that-name/x: there is no such home directory"):
        ArtifactBuilder("~nobody-of-that-name/x", "cpu", "x", tensor_parallel_size=1).build("out")


def test_python_says_the_same(nobody: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FURIOSA_BUILD_CACHE", raising=False)
    with pytest.raises(UserError, match="no such home directory"):
        default_store_root()
    with pytest.raises(UserError, match="no such home directory"):
        ArtifactBuilder(str(nobody.root / "tiny"), "cpu", "x", tensor_parallel_size=1).build("out")
