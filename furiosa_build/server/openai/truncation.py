"""The fields of a request that shorten its prompts. They are vLLM's."""

from __future__ import annotations

from pydantic import Field

from furiosa_build.server.http.body import Body, Integer


class Truncation(Body):
    """How many tokens of a prompt are kept, and of which end."""

    truncate_prompt_tokens: Integer | None = Field(None, ge=-1)
    truncation_side: str = Field("left", pattern="^(left|right)$")

    def truncated(self, tokens: list[int], longest: int) -> list[int]:
        """A prompt of at most `truncate_prompt_tokens`; -1 stands for the longest that there may be."""
        if self.truncate_prompt_tokens is None:
            return tokens
        most = longest if self.truncate_prompt_tokens == -1 else self.truncate_prompt_tokens
        return tokens[:most] if self.truncation_side == "right" else tokens[max(0, len(tokens) - most) :]
