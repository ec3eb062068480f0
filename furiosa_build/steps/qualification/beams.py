"""Compares the beams that an artifact has found with what its reference says of them, and with its own best one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from furiosa_build.steps.qualification.answers import Searched
from furiosa_build.steps.qualification.original_model import OriginalModel
from furiosa_build.steps.qualification.reference import Asked, Reference

if TYPE_CHECKING:
    from torch import Tensor

_LOOK = "look at the KV blocks that beams share, and at how they are copied when a beam goes on twice"


def differences(
    searched: Sequence[Searched],
    prompts: Sequence[Sequence[int]],
    reference: Reference,
    model: OriginalModel | None,
    allowed: float,
) -> Iterator[str]:
    """What differs, in words.

    Args:
        searched: The artifact's beams.
        prompts: What they continue, by number of the question.
        reference: Tells how likely they are.
        model: The source's model, which searches itself where it is whole; None: there is none.
        allowed: How far a logit may be off.
    """
    for each in searched:
        prompt = prompts[each.number]
        new = each.beams.shape[1] - len(prompt)
        # Two logits and the sum of all make a log probability; their errors are independent of token to token.
        room = 2 * allowed * new**0.5
        scores = _scores(each.beams, len(prompt), reference)
        for beam, (got, right) in enumerate(zip(each.scores.tolist(), scores, strict=True)):
            if not abs(got - right) <= room:
                yield (
                    f"beam {beam} of sequence {each.number}: its log probability is {got:.4g} by the artifact, "
                    f"{right:.4g} by transformers (allowed: {room:.3g} off); {_LOOK}"
                )
        if (
            model is not None
            and model.is_whole
            and not scores[0] >= (best := model.best_beam(prompt, new, len(scores))) - room
        ):
            yield (
                f"the best beam of sequence {each.number} has a log probability of {scores[0]:.4g}, and transformers "
                f"finds one of {best:.4g} (allowed: {room:.3g} less); {_LOOK}"
            )


def _scores(beams: Tensor, prompt: int, reference: Reference) -> list[float]:
    """The sum of the log probabilities of each beam's tokens after its prompt."""
    import torch

    after = torch.arange(prompt - 1, beams.shape[1] - 1)
    found = reference.logits([Asked(beam[:-1], after) for beam in beams])
    return [
        float(each.logits.log_softmax(-1).gather(-1, beam[prompt:, None]).sum())
        for each, beam in zip(found, beams, strict=True)
    ]
