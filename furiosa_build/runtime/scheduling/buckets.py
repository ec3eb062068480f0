"""Which bucket a batch takes: the cheapest that it fits into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from furiosa_build.artifact.schema import Pipeline
from furiosa_build.runtime.request import Request

# A prefill reads all weights once, whatever its size. On CPUs with matrix units that takes as long as
# computing about this many tokens, so below it, padding is free and batching pays.
_TOKENS_PER_WEIGHT_READ = 48


class Buckets:
    """The pipelines of an artifact.

    Args:
        pipelines: In any order.
        chunk_size: Most tokens of a prompt that run at once; None: as many as a bucket takes.
    """

    def __init__(self, pipelines: Iterable[Pipeline], chunk_size: int | None) -> None:
        pipelines = list(pipelines)
        # The cheapest first, so that the first that fits is the one to take.
        self._prefill = sorted((p for p in pipelines if p.phase != "decode"), key=_prefill_order)
        self._decode = sorted((p for p in pipelines if p.phase == "decode"), key=_decode_order)
        self._chunk_size = chunk_size
        # Only prompts up to this length can be split into pieces.
        self._longest_split = max((p.context_length for p in self._prefill if p.phase == "append"), default=0)

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that prefill and append buckets take."""
        return max((p.context_length for p in self._prefill), default=0)

    @property
    def max_context(self) -> int:
        """The longest context of a decode bucket: a request of more tokens cannot take another step."""
        return max((p.context_length for p in self._decode), default=0)

    @property
    def max_rows(self) -> int:
        """The most sequences that can run together."""
        return max((p.batch_size for p in self._decode or self._prefill), default=0)

    def can_split(self, length: int) -> bool:
        """Whether a prompt of `length` may run in pieces, the first of which need not run at all if they are cached."""
        return length <= self._longest_split

    @property
    def prefill_names(self) -> list[str]:
        """The names of the prefill and append buckets."""
        return [pipeline.name for pipeline in self._prefill]

    def next_piece(self, start: int, length: int) -> int:
        """The number of tokens that run next of a prompt of `length`, of which `start` are computed.

        All, or as many as a chunk has and some bucket takes.
        """
        if not self.can_split(length):
            return length - start
        most = max(min(p.query_length, p.context_length - start) for p in self._prefill if _takes(p, start))
        return min(length - start, self._chunk_size or most, most)

    def for_prefill(self, starts: Sequence[int], counts: Sequence[int]) -> Pipeline | None:
        """The bucket that runs counts[i] tokens of sequences of which starts[i] are computed; None if there is none."""
        for pipeline in self._prefill:
            if len(starts) <= pipeline.batch_size and all(
                _takes(pipeline, start) and count <= pipeline.query_length and start + count <= pipeline.context_length
                for start, count in zip(starts, counts, strict=True)
            ):
                return pipeline
        return None

    def cost_of_prompt(self, start: int, length: int) -> float:
        """The cost of a prompt of `length` of which `start` are computed; infinite if no bucket runs it."""
        cost = 0
        while start < length:
            count = self.next_piece(start, length)
            pipeline = self.for_prefill([start], [count])
            if pipeline is None:
                return float("inf")
            cost += prefill_cost(pipeline)
            start += count
        return cost

    def for_decode(self, requests: Sequence[Request]) -> Pipeline | None:
        """The bucket that runs the next token of every sequence of each request; None if there is none."""
        return self.for_rows(num_rows(requests), max(request.num_computed for request in requests))

    def for_rows(self, rows: int, computed: int) -> Pipeline | None:
        """The bucket for one more token of `rows` sequences of at most `computed` tokens; None if there is none."""
        return next((p for p in self._decode if rows <= p.batch_size and computed < p.context_length), None)


def prefill_cost(pipeline: Pipeline) -> int:
    """The cost in tokens, padding included, and what it takes to read the weights."""
    return _TOKENS_PER_WEIGHT_READ + pipeline.batch_size * pipeline.query_length


def num_rows(requests: Iterable[Request]) -> int:
    """The number of rows of a decode batch."""
    return sum(request.width for request in requests)


def _takes(pipeline: Pipeline, start: int) -> bool:
    """Whether a prefill or append bucket takes a sequence of which `start` tokens are computed."""
    return start == 0 if pipeline.phase == "prefill" else start < pipeline.context_length


def _prefill_order(pipeline: Pipeline) -> tuple[int, int]:
    # Of two that compute as much, that which reads fewer slots: prefill buckets read none but the new.
    return prefill_cost(pipeline), pipeline.batch_size * pipeline.context_length


def _decode_order(pipeline: Pipeline) -> tuple[int, int]:
    # Slots read, mostly; of two that read as many, the smaller batch computes less.
    return pipeline.batch_size * pipeline.context_length, pipeline.batch_size
