"""Embeddings: what a prompt's last hidden state becomes, and how alike two of them are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from furiosa_build.backends.device import as_float32
from furiosa_build.core.errors import BuildError, UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """How a prompt becomes an embedding. As vLLM does it for a causal model: the last token's hidden state, normalized.

    Attributes:
        normalize: Divides by the Euclidean norm.
        dimensions: Keeps the first so many numbers, before they are normalized: of models trained for it (their config
            has `is_matryoshka` or `matryoshka_dimensions`). None: all.
        truncate_prompt_tokens: Keeps so many of the prompt's last tokens, >= 1; -1: as many as the artifact takes.

    Raises:
        UserError: A value out of range.
    """

    normalize: bool = True
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        self._check("normalize", isinstance(self.normalize, bool), "True or False")
        for name, least in (("dimensions", 1), ("truncate_prompt_tokens", -1)):
            value = getattr(self, name)
            fits = value is None or (type(value) is int and value >= least and value != 0)
            self._check(name, fits, ">= 1, -1 (as many as fit), or None" if least < 0 else ">= 1, or None")

    def _check(self, name: str, fits: bool, valid: str) -> None:
        if not fits:
            value = getattr(self, name)
            raise UserError(f"{name} does not take {value!r}", where=f"PoolingParams.{name}", valid=valid)


Output = TypeVar("Output")


@dataclass(frozen=True)
class PoolingRequestOutput(Generic[Output]):
    """What a prompt is made into, under the names that vLLM has for it. A score's tokens are those of both prompts."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: Output
    finished: bool = True
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class EmbeddingOutput:
    """The embedding of a prompt."""

    embedding: list[float]


@dataclass(frozen=True)
class PoolingOutput:
    """The embedding of a prompt as a tensor: float32 [dimensions]."""

    data: Tensor


@dataclass(frozen=True)
class ScoringOutput:
    """How alike two texts are: from -1 to 1, 1 for the same."""

    score: float


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]


def check_dimensions(params: PoolingParams, hf_config: Mapping[str, Any]) -> None:
    """Raises UserError for fewer dimensions than a model has, if it was not trained for them."""
    if params.dimensions is None:
        return
    where, given = "PoolingParams.dimensions", f"{params.dimensions} dimensions"
    size = hf_config.get("hidden_size")
    listed = hf_config.get("matryoshka_dimensions")
    if not hf_config.get("is_matryoshka") and not listed:
        what = f"{given}: the model was not trained for embeddings of fewer than it has"
        raise UserError(what, where=where, valid="None")
    if listed and params.dimensions not in listed:
        raise UserError(f"{given} are none of the model's", where=where, valid=", ".join(map(str, listed)))
    if isinstance(size, int) and params.dimensions > size:
        raise UserError(f"{given} are more than the model has", where=where, valid=f"at most {size}")


def embed(hidden_state: NDArray[Any], params: PoolingParams) -> list[float]:
    """The embedding of a prompt whose last token has this hidden state [hidden_size].

    Raises:
        BuildError: It is not finite.
    """
    vector = as_float32(hidden_state)[: params.dimensions]
    if not np.isfinite(vector).all():
        raise BuildError("the model's last hidden state is not finite")
    if params.normalize:
        vector = vector / max(np.linalg.norm(vector), np.float32(1e-12))
    return [float(number) for number in vector]


def cosine(first: Sequence[float], second: Sequence[float]) -> float:
    """The cosine of the angle between two embeddings."""
    a, b = np.array(first), np.array(second)
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))
