"""What tests of single steps share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """The directory that a step writes its outputs into."""
    directory = tmp_path / "output"
    directory.mkdir()
    return directory
