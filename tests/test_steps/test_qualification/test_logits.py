"""What an artifact's logits are compared with: those of its reference, and where that is undecided, of both sides."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from furiosa_build.steps.qualification.answers import Continued
from furiosa_build.steps.qualification.logits import compare
from furiosa_build.steps.qualification.reference import Asked, Expected

LOGITS = torch.eye(8) * 10
OTHER = LOGITS.roll(1, 0)


class Undecided:
    """A reference that gives other logits at `jumps` when it rounds otherwise, and everywhere a little more."""

    dtype = "bfloat16"

    def __init__(self, *jumps: int, by: Tensor = OTHER) -> None:
        self._rounded = LOGITS + 0.3
        self._rounded[list(jumps)] = by[list(jumps)] + 0.1

    def logits(self, asked: Sequence[Asked]) -> list[Expected]:
        return [Expected(LOGITS, LOGITS) for _ in asked]

    def nudged(self, asked: Sequence[Asked]) -> list[list[Tensor]]:
        return [[LOGITS, self._rounded] for _ in asked]


def answer(logits: Tensor) -> Continued:
    tokens = torch.cat([torch.zeros(1, dtype=torch.int64), logits.argmax(-1)])
    return Continued(0, tokens, torch.arange(len(logits)), ["decode"] * len(logits), logits)


def changed(*rows: int, by: Tensor = OTHER) -> Tensor:
    logits = LOGITS.clone()
    logits[list(rows)] = by[list(rows)]
    return logits


def wrong(logits: Tensor, reference: Undecided) -> list[int]:
    return [position.row for position in compare([answer(logits)], reference, None).wrong]


def test_what_the_reference_gives_too_is_right() -> None:
    found = compare([answer(changed(2, 5))], Undecided(2, 5, 7), None)
    assert (found.wrong, found.sound) == ([], ["decode"])
    assert found.figures["tokens_by_other_rounding"] == 2


def test_what_it_never_gives_is_wrong() -> None:
    assert wrong(changed(2, 5), Undecided(5)) == [2]
    assert wrong(changed(2, by=-LOGITS), Undecided(2)) == [2]


def test_where_it_is_decided_no_more_is_allowed() -> None:
    """0.3 of a largest logit of 10 is within what is allowed, 0.7 is not, though the one is near the other."""
    assert wrong(changed(3, by=LOGITS + 0.3), Undecided()) == []
    assert wrong(changed(3, by=LOGITS + 0.7), Undecided()) == [3]


@pytest.mark.parametrize(("count", "expected"), [(4, []), (5, [0, 1, 2, 3, 4])])
def test_most_tokens_do_not_hang_on_rounding(count: int, expected: list[int]) -> None:
    rows = range(count)
    assert wrong(changed(*rows), Undecided(*rows)) == expected
