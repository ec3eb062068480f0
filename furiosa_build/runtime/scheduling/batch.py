"""The batch of one step."""

from __future__ import annotations

from dataclasses import dataclass

from furiosa_build.artifact.schema import Pipeline
from furiosa_build.runtime.request import Request, TokenSequence


@dataclass(frozen=True)
class Batch:
    """One run of a bucket: request i runs counts[i] tokens of each of its sequences, from its num_computed on.

    Rows are in the order of requests, and of their sequences.
    """

    pipeline: Pipeline
    requests: list[Request]
    counts: list[int]

    def sequences(self, request: Request) -> list[TokenSequence]:
        """The sequences of `request` that run, each in its own row. A prompt runs once for all beams of a search."""
        return request.sequences if self.pipeline.phase == "decode" else request.sequences[:1]
