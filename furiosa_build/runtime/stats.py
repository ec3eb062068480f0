"""Statistics of an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class BucketUse:
    """The use of a bucket, which its first four fields name as those of `Pipeline` do.

    Attributes:
        batches: Runs of the bucket.
        tokens: Tokens that were computed in them. The other positions were padding.
    """

    phase: str
    batch_size: int
    query_length: int
    context_length: int
    batches: int = 0
    tokens: int = 0

    @property
    def places(self) -> int:
        """Positions for tokens in all runs, padding included."""
        return self.batches * self.batch_size * self.query_length

    def plus(self, batches: int, tokens: int) -> BucketUse:
        """The use after so many more batches and tokens."""
        return replace(self, batches=self.batches + batches, tokens=self.tokens + tokens)


@dataclass(frozen=True)
class EngineStats:
    """Counts of an engine, or of the scheduler of a replica, and its present load.

    Attributes:
        prompt_tokens: Prompt tokens of the requests that have begun to run; each counts once.
        cached_tokens: The part of these whose keys and values were in the KV cache already.
        preemptions: The number of times that a request lost its KV blocks to another, and is recomputed.
        running: Requests that have KV blocks.
        waiting: Requests that have none yet, or none any more.
        kv_blocks_used: KV blocks that running requests have.
        kv_blocks: KV blocks that there are.
        buckets: The use of every bucket by its name, also of those that never ran.
        proposals: The number of times that a draft model has proposed tokens to a request.
        proposed_tokens: The number of tokens that it has proposed.
        accepted_tokens: The number of those that were accepted.
    """

    prompt_tokens: int
    cached_tokens: int
    preemptions: int
    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks: int
    buckets: Mapping[str, BucketUse]
    proposals: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """The share of proposed tokens that were accepted; None where none were proposed."""
        return self.accepted_tokens / self.proposed_tokens if self.proposed_tokens else None

    @property
    def tokens_per_proposal(self) -> float | None:
        """The tokens that a request gets from a step with proposals: those accepted and one more."""
        return 1 + self.accepted_tokens / self.proposals if self.proposals else None

    def __add__(self, other: EngineStats) -> EngineStats:
        """The sum of two that have the same buckets."""
        names = [each.name for each in fields(self) if each.name != "buckets"]
        buckets = {
            name: use.plus(other.buckets[name].batches, other.buckets[name].tokens)
            for name, use in self.buckets.items()
        }
        return EngineStats(**{name: getattr(self, name) + getattr(other, name) for name in names}, buckets=buckets)
