"""A user's directory outside of the repository, with recipes and conf files of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Write = Callable[[str, str], Path]

VALID = """\
# A recipe of a user.
defaults:
  - base
  - model: quickstart
  - buckets: small
  - quantization: none
"""
"""A valid recipe of 6 lines: what a test adds begins on line 7."""


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file below the user's directory, which is `tmp_path`."""

    def write(path: str, text: str) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return write
