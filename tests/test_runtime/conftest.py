from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_build.runtime import rank

from . import toy


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
