"""What Prometheus is told. Each server has a registry of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from furiosa_build.runtime.scheduler import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """The counts and times of one server.

    Args:
        stats: The engine's numbers as they are now; None while there is no engine.
    """

    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._registry = CollectorRegistry()
        self.http = Counter(
            "furiosa_http_requests", "HTTP requests answered.", ["path", "status"], registry=self._registry
        )
        self.finished = Counter(
            "furiosa_requests_finished",
            "Texts that ended: stop, length, abort (the client left, or it was cut), error.",
            ["reason"],
            registry=self._registry,
        )
        self.prompt_tokens = Counter("furiosa_prompt_tokens", "Tokens of prompts.", registry=self._registry)
        self.generated_tokens = Counter("furiosa_generated_tokens", "Tokens generated.", registry=self._registry)
        self.first_token = self._seconds("furiosa_time_to_first_token_seconds", "From a request to its first token.")
        self.per_token = self._seconds(
            "furiosa_time_per_output_token_seconds", "A text's mean time from token to token, from the first on."
        )
        self.queue = self._seconds("furiosa_queue_seconds", "From a request to its first step.")
        self.duration = self._seconds("furiosa_request_seconds", "From a request to the end of its text.")
        for name, help_text in (
            ("running", "Texts that are being generated."),
            ("waiting", "Texts that wait for their first step, or to go on."),
            ("kv_blocks", "KV blocks that there are."),
            ("kv_blocks_used", "KV blocks in use."),
        ):
            gauge = Gauge(f"furiosa_{name}", help_text, registry=self._registry)
            gauge.set_function(lambda name=name: getattr(stats(), name, 0))  # type: ignore[misc]

        tasks = Gauge("furiosa_tasks", "Coroutines under way.", registry=self._registry)
        tasks.set_function(lambda: len(asyncio.all_tasks()))
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """In the form that Prometheus reads. Called in the event loop's thread."""
        return generate_latest(self._registry)

    def _seconds(self, name: str, help_text: str) -> Histogram:
        return Histogram(name, help_text, buckets=_SECONDS, registry=self._registry)
