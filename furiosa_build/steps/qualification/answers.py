"""What an artifact has answered: the file that `runtime.probe` writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Continued:
    """A prompt, its continuation, and the logits of some of its positions.

    Attributes:
        number: Which of the prompts that were asked for.
        tokens: int64 [prompt + new].
        after: int64 [positions], which positions: each gives the logits of the token that follows it.
        buckets: What computed each.
        logits: float32 [positions, vocab].
    """

    number: int
    tokens: Tensor
    after: Tensor
    buckets: list[str]
    logits: Tensor

    @property
    def chosen(self) -> Tensor:
        """The tokens that the artifact chose there, int64 [positions]."""
        return self.tokens[self.after + 1]


@dataclass(frozen=True, eq=False)
class Searched:
    """A prompt and the beams of its search, the best first: int64 [beams, prompt + new]; sums of log probabilities."""

    number: int
    beams: Tensor
    scores: Tensor


class Answers:
    """The answers in a file.

    Attributes:
        told: The answers that are no tensors.
    """

    def __init__(self, file: Path) -> None:
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            self._tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            self.told: dict[str, Any] = {k: json.loads(text) for k, text in (opened.metadata() or {}).items()}

    @cached_property
    def continued(self) -> list[Continued]:
        """The prompts that were continued by the likeliest tokens."""
        names: list[str] = self.told["buckets"]
        return [
            Continued(
                k,
                self._tensors[f"tokens.{k}"],
                self._tensors[f"after.{k}"],
                [names[bucket] for bucket in self._tensors[f"buckets.{k}"]],
                self._tensors[f"logits.{k}"],
            )
            for k in self._numbers("tokens")
        ]

    @cached_property
    def searched(self) -> list[Searched]:
        """The prompts that were continued by beam search."""
        return [Searched(k, self._tensors[f"beams.{k}"], self._tensors[f"scores.{k}"]) for k in self._numbers("beams")]

    def _numbers(self, kind: str) -> list[int]:
        return sorted(int(name.removeprefix(f"{kind}.")) for name in self._tensors if name.startswith(f"{kind}."))
