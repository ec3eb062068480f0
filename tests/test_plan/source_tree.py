"""A copy of the package that keys are computed from, to be edited."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from furiosa_build.plan import keys

PACKAGE = Path(keys.__file__).resolve().parent.parent


@contextmanager
def copied_package(directory: Path) -> Iterator[Path]:
    """A copy in `directory`: what runs is still the package itself. After an edit of it, `forget_sources`."""
    copied = directory / "furiosa_build"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_PACKAGE", copied)
        forget_sources()
        yield copied
    forget_sources()


def forget_sources() -> None:
    """What a process remembers of sources, as if it had just begun."""
    for cached in (keys.imported_modules, keys._direct_imports, keys._tree, keys._code_digest):
        cached.cache_clear()
