"""Compares the logits of an artifact with those of its reference, and says where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from furiosa_build.core.errors import StepError
from furiosa_build.steps.qualification.answers import Continued
from furiosa_build.steps.qualification.reference import Asked, Reference

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of a logit, as a share of the largest logit. Both sides round to the model's dtype after every
operation, in another order: 8 bits of mantissa through some tens of operations a layer."""


_MOST_BY_ROUNDING = 0.5
"""More than this share of all tokens do not hang on the last bit: where so many differ, the model is another."""


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
    differing = [
        Position(each, row, right.logits[row]) for each, right in pairs for row in _wrong(each, right.logits, allowed)
    ]
    wrong = differing
    if 0 < len(differing) <= tokens * _MOST_BY_ROUNDING:
        wrong = _not_by_rounding(differing, reference, allowed)
    buckets = dict.fromkeys(bucket for each in answers for bucket in each.buckets)
    return Comparison(
        {
            "tokens": tokens,
            "top1_agreement": agreeing / tokens,
            "tokens_by_other_rounding": len(differing) - len(wrong),
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


def _wrong(answer: Continued, expected: Tensor, allowed: float) -> list[int]:
    """The rows at which the artifact differs from `expected` by more than is allowed."""
    difference = (answer.logits - expected).abs().amax(-1)
    best = expected.amax(-1)
    # A choice between near-equal logits may fall either way; one that costs more than rounding explains may not.
    regret = best - expected.gather(-1, answer.chosen[:, None])[:, 0]
    rows: list[int] = (difference.gt(allowed) | regret.gt(2 * allowed)).nonzero()[:, 0].tolist()
    return rows


def _not_by_rounding(differing: Sequence[Position], reference: Reference, allowed: float) -> list[Position]:
    """Those positions at which the artifact gives nothing that the reference gives, however that rounds.

    A mixture whose router is undecided takes another expert for a difference in the last bit, and all its logits
    change. In such a place the artifact is right if it gives what the reference gives with either. Where the reference
    does not change by more than is allowed, nothing is undecided, and nothing more is allowed.
    """
    answers = {each.continued.number: each.continued for each in differing}
    rounded = reference.nudged([Asked(each.tokens[:-1], each.after) for each in answers.values()])
    found = {
        number: [(logits, _wrong(answer, logits, allowed)) for logits in draws]
        for (number, answer), draws in zip(answers.items(), rounded, strict=True)
    }

    def is_right(position: Position) -> bool:
        return any(
            position.row not in wrong and float((logits[position.row] - position.expected).abs().max()) > allowed
            for logits, wrong in found[position.continued.number]
        )

    return [each for each in differing if not is_right(each)]
