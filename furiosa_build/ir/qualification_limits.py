"""How far an artifact may be from the model it was made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class QualificationLimits(BaseModel):
    """Limits of what `qualify` accepts.

    Attributes:
        logit_tolerance: How far a logit may be from that of the model whose weights are rounded as the artifact's are,
            as a share of the largest one. None: what rounding to the model's dtype explains.
        max_kl_divergence: The largest mean divergence from the model as published, in nats a token.
        min_top1_agreement: The least share of tokens for which both rank the same next token first.
        max_perplexity_ratio: The largest ratio of the perplexities of the quantized and the published model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    logit_tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_kl_divergence: Annotated[float, Field(ge=0)] = 0.5
    min_top1_agreement: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_perplexity_ratio: Annotated[float, Field(gt=0)] = 1.5
