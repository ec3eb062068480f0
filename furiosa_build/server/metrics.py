"""Metrics for Prometheus. Each server has a registry of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from furiosa_build.runtime.stats import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counts and times of one server.

    Args:
        stats: Gives the engine's statistics; None while there is no engine.
    """

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self.http = Counter(
            "furiosa_http_requests", "HTTP requests answered.", ["path", "status"], registry=self._registry
        )
        self.finished = Counter(
            "furiosa_requests_finished",
            "Texts that ended: stop, length, abort (the client disconnected, or the server shut down), error.",
            ["reason"],
            registry=self._registry,
        )
        self.generated_tokens = Counter("furiosa_generated_tokens", "Tokens generated.", registry=self._registry)
        self.first_token = self._seconds("furiosa_time_to_first_token_seconds", "From a request to its first token.")
        self.per_token = self._seconds(
            "furiosa_time_per_output_token_seconds", "A text's mean time from token to token, from the first on."
        )
        self.queue = self._seconds("furiosa_queue_seconds", "From a request to its first step.")
        self.duration = self._seconds("furiosa_request_seconds", "From a request to the end of its text.")
        self._registry.register(_EngineCollector(stats))
        tasks = Gauge("furiosa_tasks", "Coroutines under way.", registry=self._registry)
        tasks.set_function(lambda: len(asyncio.all_tasks()))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format. To be called in the event loop's thread."""
        return generate_latest(self._registry)

    def _seconds(self, name: str, help_text: str) -> Histogram:
        return Histogram(name, help_text, buckets=_SECONDS, registry=self._registry)


class _EngineCollector(Collector):
    """The engine's own statistics at the time of a scrape; nothing while there is no engine."""

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """The metric families."""
        stats = self._stats()
        if stats is None:
            return
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"furiosa_{name}", text, getattr(stats, name))
        for name, (field, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"furiosa_{name}", text, getattr(stats, field))
        for name, text in _BUCKET_COUNTERS.items():
            family = CounterMetricFamily(f"furiosa_bucket_{name}", text, labels=_BUCKET)
            for use in stats.buckets.values():
                family.add_metric([str(getattr(use, label)) for label in _BUCKET], getattr(use, name))
            yield family


_GAUGES = {
    "running": "Texts that are being generated.",
    "waiting": "Texts that wait for their first step, or to go on.",
    "kv_blocks": "KV blocks that there are.",
    "kv_blocks_used": "KV blocks in use.",
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "Tokens of the prompts that have begun to run."),
    "cached_prompt_tokens": ("cached_tokens", "Those of them that were in the KV cache already."),
    "preemptions": ("preemptions", "Texts that were preempted and recomputed."),
    "draft_proposals": ("proposals", "Steps of a text in which the draft model proposed tokens."),
    "draft_proposed_tokens": ("proposed_tokens", "What it proposed."),
    "draft_accepted_tokens": ("accepted_tokens", "Those of them that were accepted."),
}
_BUCKET_COUNTERS = {
    "batches": "Runs of a bucket.",
    "tokens": "Tokens computed in them.",
    "places": "Places for tokens in them. Those without a token are padding.",
}
_BUCKET = ("phase", "batch_size", "query_length", "context_length")
