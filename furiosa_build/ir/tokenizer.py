"""The tokenizer that an artifact gets, as far as a plan knows it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class TokenizerOutline(BaseModel):
    """A tokenizer that has been made of a model's files, or will be once they can be fetched.

    Attributes:
        num_tokens: How many tokens it has.
        beyond_vocabulary: Its tokens that the model has no embedding for, with their ids.
        unknown: Why nothing is known of it yet: its files could not be fetched. A plan can do without, a build cannot.
        files: sha256 (hex) of what it consists of in an artifact, by name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    num_tokens: int = 0
    beyond_vocabulary: dict[str, int] = {}
    unknown: str = ""
    files: dict[str, str] = {}
