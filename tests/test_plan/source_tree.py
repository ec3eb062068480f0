"""A copy of the package that keys are computed from, to be edited."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from furiosa_build.plan import source_code

PACKAGE = source_code.PACKAGE


@contextmanager
def copied_package(directory: Path) -> Iterator[Path]:
    """A copy in `directory`, which builds take for their source. What runs is still the package itself."""
    copied = directory / "furiosa_build"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_code, "PACKAGE", copied)
        yield copied
