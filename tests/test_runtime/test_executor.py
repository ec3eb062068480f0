"""Where the ranks of a replica are made. What they compute: test_end_to_end/test_parallel.py."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from furiosa_build.artifact.reader import OpenArtifact, open_artifact
from furiosa_build.artifact.stages import restage
from furiosa_build.core.errors import UserError
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.execution import executor
from furiosa_build.runtime.execution.rank import RankRunner

from . import toy


@pytest.fixture
def in_threads(toy_backend: toy.ToyBackend, tmp_path: Path) -> Path:
    """An artifact of two replicas, each of which has a thread."""
    del toy_backend
    data = toy.artifact_data()
    data["parallel_config"]["data_parallel_size"] = 2
    return toy.write_artifact(tmp_path / "two", data)


def test_a_rank_is_made_in_its_own_thread(in_threads: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def watched(*arguments: Any) -> RankRunner:
        made.append(threading.current_thread())
        return RankRunner(*arguments)

    monkeypatch.setattr(executor, "RankRunner", watched)
    with closing(LLMEngine(in_threads)) as engine:
        threads = [thread for replica in engine._replicas for thread in replica.executor._threads]
        assert made == threads


def test_a_rank_that_cannot_be_made_leaves_no_thread(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do the others, which can."""
    threads = set(threading.enumerate())

    def refused(*arguments: Any) -> RankRunner:
        made = RankRunner(*arguments)
        if made.stage == 1:
            raise UserError("no memory for KV caches", where="paged_attention_num_blocks")
        return made

    monkeypatch.setattr(executor, "RankRunner", refused)
    opened = open_artifact(toy_artifact)
    in_stages = OpenArtifact(opened.directory, restage(opened.artifact, 2), opened.manifest)
    with pytest.raises(UserError, match="no memory for KV caches"):
        LLMEngine(in_stages)
    assert set(threading.enumerate()) == threads
