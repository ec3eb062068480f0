"""How much quantization costs: a quantized model beside the one that was published, on a text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from furiosa_build.ir.qualification_limits import QualificationLimits
from furiosa_build.plan.budget.reference import text_tokens
from furiosa_build.steps.qualification.reference import Asked

if TYPE_CHECKING:
    from torch import Tensor

_WINDOW = 256
"""Tokens of the text that are read at a time."""


@dataclass(frozen=True)
class Quality:
    """A quantized model beside the published one.

    Attributes:
        tokens: Tokens that were predicted.
        kl_divergence: Mean divergence of the quantized model's next token from the published one's, in nats.
        top1_agreement: The share of tokens for which both rank the same next token first.
        perplexity: Of the text by the quantized model.
        published_perplexity: Of the text by the published one.
    """

    tokens: int
    kl_divergence: float
    top1_agreement: float
    perplexity: float
    published_perplexity: float

    @property
    def figures(self) -> dict[str, float]:
        """As in qualification.json."""
        return {f"quantization_{name}": figure for name, figure in asdict(self).items()}

    def beyond(self, limits: QualificationLimits) -> list[str]:
        """What is beyond the limits, in words; empty: nothing is."""
        ratio = self.perplexity / self.published_perplexity
        found = (
            (
                self.kl_divergence <= limits.max_kl_divergence,
                f"its predictions diverge by {self.kl_divergence:.3g} nats a token from the published model's",
                f"qualify.max_kl_divergence={limits.max_kl_divergence:g}",
            ),
            (
                self.top1_agreement >= limits.min_top1_agreement,
                f"it ranks the same next token first for {self.top1_agreement:.1%} of {self.tokens} tokens",
                f"qualify.min_top1_agreement={limits.min_top1_agreement:g}",
            ),
            (
                ratio <= limits.max_perplexity_ratio,
                f"its perplexity is {self.perplexity:.4g}, the published model's {self.published_perplexity:.4g}",
                f"qualify.max_perplexity_ratio={limits.max_perplexity_ratio:g}",
            ),
        )
        return [f"{what} ({limit})" for holds, what, limit in found if not holds]


def windows(tokens: list[int], parameters: int, vocab: int) -> list[Asked]:
    """The beginning of a text, in pieces: as much as a model of so many parameters reads in a minute or so."""
    import torch

    kept = torch.tensor(tokens[: text_tokens(parameters, vocab)], dtype=torch.int64)
    return [Asked(part, torch.arange(len(part) - 1)) for part in torch.split(kept, _WINDOW) if len(part) > 1]


def quality(text: list[Asked], published: list[Tensor], quantized: list[Tensor]) -> Quality:
    """Compares the logits of a text by both models: float32 [tokens - 1, vocab] of each window."""
    import torch

    count = divergence = agreeing = loss = published_loss = 0.0
    for window, right, got in zip(text, published, quantized, strict=True):
        p, q, following = right.log_softmax(-1), got.log_softmax(-1), window.tokens[1:, None]
        count += len(following)
        divergence += float((p.exp() * (p - q)).sum())
        agreeing += int((right.argmax(-1) == got.argmax(-1)).sum())
        loss -= float(q.gather(-1, following).sum())
        published_loss -= float(p.gather(-1, following).sum())
    perplexity, published_perplexity = torch.tensor([loss / count, published_loss / count]).exp().tolist()
    return Quality(int(count), divergence / count, agreeing / count, perplexity, published_perplexity)
