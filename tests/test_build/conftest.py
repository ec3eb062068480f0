"""What the tests of builds share: a tiny model, and directories in which it has been built or not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from user_directory import UserDirectory, make_model, make_user_directory, steps_in_this_process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def built_store(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A store in which the recipe has been built, from another directory. Only read."""
    root = tmp_path_factory.mktemp("built")
    with steps_in_this_process():
        assert make_user_directory(root / "user", root / "store", model).build()
    return root / "store"


@pytest.fixture
def new(tmp_path: Path, model: Path) -> UserDirectory:
    """Nothing has been built."""
    return make_user_directory(tmp_path / "user", tmp_path / "store", model)


@pytest.fixture
def user(tmp_path: Path, model: Path, built_store: Path) -> UserDirectory:
    """The recipe has been built here, in a store of its own."""
    shutil.copytree(built_store, tmp_path / "store")
    directory = make_user_directory(tmp_path / "user", tmp_path / "store", model)
    assert directory.build() == []
    return directory
