"""The outline is plain data that survives the way through the store."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from test_plan.outlines import outline

from furiosa_build.ir.outline import Outline


def test_an_outline_survives_json() -> None:
    assert Outline.model_validate_json(outline().model_dump_json()) == outline()


def test_num_parameters_counts_the_numbers() -> None:
    assert outline(layers=3).num_parameters == 2 * 100 * 8 + 8 + 3 * (8 + 8 * 8 + 8 * 16)


@pytest.mark.parametrize("damage", [{"extra": 1}, {"blocks": None}, {"parameters": {"a": {}}}])
def test_what_is_no_outline_is_refused(damage: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Outline.model_validate({**outline().model_dump(), **damage})
