"""Says where an artifact's logits differ from its reference's, and what to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from furiosa_build.runtime.probe import Questions
from furiosa_build.steps.qualification.answers import Answers
from furiosa_build.steps.qualification.logits import Comparison, compare
from furiosa_build.steps.qualification.original_model import OriginalModel
from furiosa_build.steps.qualification.reference import Reference

if TYPE_CHECKING:
    from furiosa_build.steps.qualify import QualifyRequest
    from furiosa_build.weights.source import TensorSource


def explain(
    comparison: Comparison,
    asked: Questions,
    ask: Callable[[Questions], Path],
    reference: Reference,
    parameters: Sequence[str],
) -> str:
    """A refusal in words.

    Args:
        comparison: What was found; something is wrong.
        asked: The questions.
        ask: Has the artifact answer others.
        reference: What its logits were compared with.
        parameters: What is known to differ of the parameters, in words.
    """
    first, figures = comparison.wrong[0], comparison.figures
    what = (
        f"the artifact's logits are not the model's: they differ at {len(comparison.wrong)} of {figures['tokens']} "
        f"tokens, by up to {figures['largest_logit_difference']:.3g} "
        f"(allowed: {figures['allowed_logit_difference']:.3g}); first {first.describe()}"
    )
    buckets = list(dict.fromkeys(position.bucket for position in comparison.wrong))
    if comparison.sound:
        what += f". Wrong: {', '.join(buckets)}; right: {', '.join(comparison.sound)}"
    if parameters:
        look = f"look at the weights: {'; '.join(parameters)}"
    elif _is_right_alone(first.continued.number, asked, ask, reference):
        look = (
            "computed alone, the same sequence is right: look at what depends on its neighbours in a batch, "
            "such as padding, masks and tables, or on tokens that the KV cache has kept"
        )
    elif comparison.sound:
        look = "look at what these programs do with positions, masks, windows and padding"
    else:
        look = "no bucket is right: look at config.json (rotary embedding, norms, activation), and at the programs"
    return f"{what}; {look}"


def _is_right_alone(number: int, asked: Questions, ask: Callable[[Questions], Path], reference: Reference) -> bool:
    """Whether a prompt is continued rightly when no other runs beside it, or has run before."""
    continuations = [each for one in asked.rounds for each in one]
    if len(continuations) == 1:
        return False
    answers = Answers(ask(Questions(rounds=[[continuations[number]]])))
    return not compare(answers.continued, reference, None).wrong


def differing_parameters(request: QualifyRequest, stored: TensorSource, model: OriginalModel | None) -> list[str]:
    """What the build took for other parameters than transformers does, in words: the first three."""
    found = [] if model is None else list(_differing(request, stored, model))
    return [*found[:3], *([f"and {len(found) - 3} more"] if found[3:] else [])]


def _differing(request: QualifyRequest, stored: TensorSource, model: OriginalModel) -> Iterator[str]:
    import torch

    outline = request.outline.parameters
    absent, pointers, apart = set(outline), set[int](), list[tuple[str, int]]()
    ours = {model.name_of(name): name for name in outline}
    for theirs, tensor in model.parameters():
        name = ours.get(theirs)
        if name is None:
            apart.append((theirs, tensor.data_ptr()))
            continue
        absent.remove(name)
        pointers.add(tensor.data_ptr())
        if name not in request.schemes:
            own = stored.read(name).to(getattr(torch, outline[name].dtype))
            if not torch.equal(own, tensor.to(own.dtype)):
                yield f"{name} is another tensor by transformers (which file, and which name in it, was read?)"
    yield from (f"{name} is none of transformers' parameters" for name in sorted(absent))
    for theirs, pointer in apart:
        if pointer not in pointers and model.is_of_text(theirs):
            yield f"{theirs} is a parameter of its own by transformers, and tied to another one here"
