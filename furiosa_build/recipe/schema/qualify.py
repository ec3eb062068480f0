"""Section `qualify`: what an artifact is measured on, and how far it may be from the model it was made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from furiosa_build.ir.qualification_limits import QualificationLimits
from furiosa_build.recipe.schema.section import Section


class QualifySpec(QualificationLimits, Section):
    """How an artifact is judged. No byte of it depends on this.

    Attributes:
        texts: A file of text to measure a quantized model on. None: some pages of Jane Austen.
    """

    texts: Annotated[str, Field(min_length=1)] | None = None
