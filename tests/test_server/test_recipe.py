"""One command leads from a recipe to a service."""

from __future__ import annotations

from pathlib import Path

import pytest
from user_directory import UserDirectory, furiosa_build, make_model, make_user_directory, steps_in_this_process

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.cli import serving
from furiosa_build.server.options import ServerOptions

from .process import PATIENCE_S, server

ASKED = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0, "ignore_eos": True, "logprobs": 0}


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> UserDirectory:
    """A directory without artifacts. The store has what workers make, who take long to start."""
    root = tmp_path_factory.mktemp("recipe")
    user = make_user_directory(root / "user", root / "store", make_model(root / "model"))
    with steps_in_this_process():
        user.build()
    user.artifacts.rename(root / "elsewhere")
    return user


def serve(user: UserDirectory) -> tuple[str, object]:
    """What a server of the recipe prints while it builds, and what it answers."""
    printed = user.root / "printed"
    with (
        printed.open("w") as out,
        server(
            "tiny",
            cli="main",
            cwd=user.root,
            environment={"FURIOSA_BUILD_CACHE": str(user.store)},
            stdout=out,
        ) as started,
    ):
        assert started.wait_for("ready")["model"] == "tiny"
        with started.http as http:
            answer = http.post("/v1/completions", json=ASKED)
        assert answer.status_code == 200
        started.process.terminate()
        assert started.process.wait(PATIENCE_S) == 0
    return printed.read_text(), answer.json()["choices"]


def test_a_recipe_is_built_if_it_must_be(user: UserDirectory) -> None:
    assert not user.artifacts.exists()
    printed, first = serve(user)
    artifact = user.latest()  # stays
    assert "package" in printed
    printed, second = serve(user)
    assert "ran 0 of" in printed
    assert first == second
    assert user.latest() == artifact


def test_overrides_may_stand_anywhere(user: UserDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[Path, ServerOptions]] = []
    monkeypatch.setattr(serving, "launch", lambda artifact, options: served.append((artifact(), options)))
    with steps_in_this_process():
        ran = furiosa_build(user, "serve", "--seed", "2", "tiny", "--port", "1", "scheduler.max_processing_samples=7")
    assert (ran.status, ran.err) == (0, "")
    [(artifact, given)] = served
    assert given == ServerOptions(seed=2, port=1)
    scheduler = open_artifact(artifact).artifact.generator_config.default_scheduler_config
    assert scheduler.max_processing_samples == 7


def test_where_a_build_has_saved_one_artifact_it_is_served(
    user: UserDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Path] = []
    monkeypatch.setattr(serving, "launch", lambda artifact, _: served.append(artifact()))
    with steps_in_this_process():
        user.build()
    assert furiosa_build(user, "serve", "artifacts").status == 0
    assert served == [(user.artifacts / "latest").resolve()]


def test_a_path_is_no_recipe(user: UserDirectory) -> None:
    for path, words in (
        ("./tinny", "is not a directory"),
        ("./recipes", "is not an artifact: it has no artifact.json"),
    ):
        ran = furiosa_build(user, "serve", path)
        assert (ran.status, ran.err.splitlines()[0]) == (2, f"error: {path} {words}")


def test_a_build_that_fails_serves_nothing(user: UserDirectory) -> None:
    ran = furiosa_build(user, "serve", "tiny", "--port", "0", "scheduler.max_processing_samples=0")
    assert ran.status == 2
    assert "max_processing_samples" in ran.err
