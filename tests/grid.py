"""Grids: one check over many models and settings. `make test` runs what stands for them, `make test-all` all."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest


def grid(cases: Iterable[Any], everyday: Container[Any]) -> list[Any]:
    """Cases of a parametrization, all but those `everyday` with the mark `grid`. A tuple is several parameters.

    Args:
        cases: The values, or tuples of values.
        everyday: Those that `make test` runs too.
    """
    return [case if case in everyday else _marked(case) for case in cases]


def _marked(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.grid)
