"""What an engine has done, and has under way, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class BucketUse:
    """What has run through a bucket, which is named by its first four fields as `Pipeline` is.

    Attributes:
        batches: Runs of the bucket.
        tokens: That were computed in them. The other places were padding.
    """

    phase: str
    batch_size: int
    query_length: int
    context_length: int
    batches: int = 0
    tokens: int = 0

    @property
    def places(self) -> int:
        """For tokens, in all runs."""
        return self.batches * self.batch_size * self.query_length

    def plus(self, batches: int, tokens: int) -> BucketUse:
        """The same bucket after so many more."""
        return replace(self, batches=self.batches + batches, tokens=self.tokens + tokens)


@dataclass(frozen=True)
class EngineStats:
    """What an engine, or the scheduler of a replica, has done and has under way.

    Attributes:
        prompt_tokens: Of the requests that have begun to run; each counts once.
        cached_tokens: Those of them whose keys and values were in the KV cache already.
        preemptions: How often a request gave its KV blocks back for another, and is computed again.
        running: Requests that have KV blocks.
        waiting: Requests that have none yet, or none any more.
        kv_blocks_used: KV blocks that running requests have.
        kv_blocks: KV blocks that there are.
        buckets: Of every bucket by its name, also of those that never ran.
        proposals: How often a draft model has proposed tokens to a request.
        proposed_tokens: What it has proposed.
        accepted_tokens: Those of them that were accepted.
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
        """How many tokens a request gets from a step with proposals: those accepted and one more."""
        return 1 + self.accepted_tokens / self.proposals if self.proposals else None

    def __add__(self, other: EngineStats) -> EngineStats:
        """Of both together, which have the same buckets."""
        names = [each.name for each in fields(self) if each.name != "buckets"]
        buckets = {
            name: use.plus(other.buckets[name].batches, other.buckets[name].tokens)
            for name, use in self.buckets.items()
        }
        return EngineStats(**{name: getattr(self, name) + getattr(other, name) for name in names}, buckets=buckets)
