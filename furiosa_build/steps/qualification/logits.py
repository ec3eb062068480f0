"""Compares the logits of an artifact with those of its reference, and says where they differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from furiosa_build.core.errors import StepError
from furiosa_build.steps.qualification.answers import Continued
from furiosa_build.steps.qualification.reference import Asked, Expected, Reference

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of a logit, as a share of the largest logit. Both sides round to the model's dtype after every
operation, in another order: 8 bits of mantissa through some tens of operations a layer."""


@dataclass(frozen=True, eq=False)
class Position:
    """One position at which the logits differ: float32 [vocab]."""

    continued: Continued
    row: int
    expected: Tensor

    @property
    def bucket(self) -> str:
        """What computed it."""
        return self.continued.buckets[self.row]

    def describe(self) -> str:
        """Where it is, and what differs most."""
        got, right = self.continued.logits[self.row], self.expected
        after, most = int(self.continued.after[self.row]), int((got - right).abs().argmax())
        return (
            f"after token {after} of sequence {self.continued.number}, in bucket {self.bucket}: the logit of token "
            f"{most} is {float(got[most]):.4g}, by transformers {float(right[most]):.4g}; the next token is "
            f"{int(got.argmax())}, by transformers {int(right.argmax())}"
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """The logits of an artifact beside those of its reference.

    Attributes:
        figures: `tokens`, `top1_agreement` and so on, as in qualification.json.
        wrong: The positions that differ by more than rounding explains.
        sound: Buckets all of whose positions agree.
    """

    figures: dict[str, Any]
    wrong: list[Position]
    sound: list[str]


def compare(answers: Sequence[Continued], reference: Reference, tolerance: float | None) -> Comparison:
    """Compares. Raises StepError for logits that are not finite."""
    expected = reference.logits([Asked(each.tokens[:-1], each.after) for each in answers])
    for each, right in zip(answers, expected, strict=True):
        _check_finite(each, right.logits)
    pairs = list(zip(answers, expected, strict=True))
    largest = max(float(right.logits.abs().max()) for right in expected)
    noise = max(float((right.logits - right.unrounded).abs().max()) for right in expected)
    # Of an activation that lies between two steps chance decides, here as there: as much as rounding it does at all.
    allowed = (tolerance or TOLERANCE[reference.dtype]) * max(largest, 1.0) + noise
    tokens = sum(len(each.after) for each in answers)
    agreeing = sum(int((right.logits.argmax(-1) == each.chosen).sum()) for each, right in pairs)
    wrong = [position for each, right in pairs for position in _wrong(each, right, allowed)]
    buckets = dict.fromkeys(bucket for each in answers for bucket in each.buckets)
    return Comparison(
        {
            "tokens": tokens,
            "top1_agreement": agreeing / tokens,
            "largest_logit_difference": max(float((each.logits - right.logits).abs().max()) for each, right in pairs),
            "allowed_logit_difference": allowed,
            "largest_logit": largest,
            "buckets": sorted(buckets),
        },
        wrong,
        [bucket for bucket in buckets if bucket not in {position.bucket for position in wrong}],
    )


def _check_finite(answer: Continued, expected: Tensor) -> None:
    """No comparison would find what is not a number."""
    for logits, whose, look in (
        (answer.logits, "the artifact's", "a sum that overflows its dtype, or a mask that leaves a row nothing"),
        (expected, "the reference's", "the source's weights: is one not a number, or too large for its dtype"),
    ):
        if not (rows := logits.isfinite().all(-1)).all():
            row = int(rows.logical_not().nonzero()[0])
            where = f"after token {int(answer.after[row])} of sequence {answer.number}, in bucket {answer.buckets[row]}"
            raise StepError("qualify", f"{whose} logits are not finite {where}; look at {look}")


def _wrong(answer: Continued, expected: Expected, allowed: float) -> Iterator[Position]:
    difference = (answer.logits - expected.logits).abs().amax(-1)
    best = expected.logits.amax(-1)
    # A choice between near-equal logits may fall either way; one that costs more than rounding explains may not.
    regret = best - expected.logits.gather(-1, answer.chosen[:, None])[:, 0]
    for row in (difference.gt(allowed) | regret.gt(2 * allowed)).nonzero()[:, 0].tolist():
        yield Position(answer, row, expected.logits[row])
