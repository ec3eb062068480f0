from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_build.artifact.reader import OpenArtifact, open_artifact
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.execution import rank
from furiosa_build.runtime.sampling.guided import Guides
from furiosa_build.runtime.text.tokenizer import Tokenizer

from . import toy
from .guides import END, QUICKSTART, VOCAB


@pytest.fixture
def toy_backend(monkeypatch: pytest.MonkeyPatch) -> toy.ToyBackend:
    """Artifacts opened in the test run their programs by this backend."""
    backend = toy.ToyBackend()
    monkeypatch.setattr(rank, "get_backend", lambda _: backend)
    return backend


@pytest.fixture
def toy_artifact(toy_backend: toy.ToyBackend, tmp_path: Path) -> Path:
    """The toy model's artifact with its default buckets, a tokenizer and no stop tokens that come up by chance."""
    del toy_backend
    return toy.write_artifact(tmp_path / "artifact")


@pytest.fixture
def opened(toy_artifact: Path) -> OpenArtifact:
    return open_artifact(toy_artifact)


@pytest.fixture
def engine(opened: OpenArtifact) -> LLMEngine:
    return LLMEngine(opened, seed=1)


@pytest.fixture
def for_hits(toy_backend: toy.ToyBackend, tmp_path: Path) -> Path:
    """An artifact with blocks of 4 tokens, and an append bucket for what comes after those that are known."""
    del toy_backend
    buckets = {"prefill": [(1, 16)], "append": [(1, 4, 48)], "decode": [(4, 48)]}
    return toy.write_artifact(tmp_path / "hits", toy.artifact_data(buckets, block_size=4))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The quickstart model's."""
    return Tokenizer(QUICKSTART)


@pytest.fixture(scope="session")
def guides(tokenizer: Tokenizer) -> Guides:
    """Of the quickstart model's tokenizer."""
    return Guides(tokenizer, [END], VOCAB)
