from __future__ import annotations

import pytest
import torch

from furiosa_build.core.errors import UserError
from furiosa_build.weights.cast import cast


def test_a_number_that_becomes_infinite_is_named() -> None:
    weight = torch.ones(4, 8, dtype=torch.bfloat16)
    weight[3, 5] = 2.0e5
    with pytest.raises(UserError) as error:
        cast("model.norm.weight", weight, torch.float16)
    assert error.value.what == (
        "float16 cannot hold the weights: model.norm.weight[3, 5] is 199680 (1 of 32 numbers are too large)"
    )
    assert (error.value.where, error.value.valid) == ("config.json, dtype", "numbers up to 65504 for float16")
    assert "bfloat16" in error.value.hint


def test_what_fits_is_rounded_and_what_was_infinite_stays() -> None:
    weight = torch.tensor([1 / 3, float("inf"), float("nan")])
    assert cast("w", weight, torch.float16).equal(weight.to(torch.float16)) is False, "nan is no number"
    assert str(cast("w", weight, torch.float16)) == str(weight.to(torch.float16))
    assert cast("w", torch.ones(2, dtype=torch.bfloat16), torch.float32).dtype == torch.float32
    assert cast("w", torch.ones(2, dtype=torch.int8), torch.float16).dtype == torch.float16
