"""What Prometheus reads."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from furiosa_build.runtime.stats import BucketUse, EngineStats
from furiosa_build.server.metrics import Metrics

from .process import Server

STATS = EngineStats(
    prompt_tokens=80,
    cached_tokens=20,
    preemptions=3,
    running=2,
    waiting=1,
    kv_blocks_used=5,
    kv_blocks=9,
    proposals=4,
    proposed_tokens=12,
    accepted_tokens=7,
    buckets={
        "a": BucketUse("prefill", 1, 32, 32, batches=2, tokens=48),
        "b": BucketUse("decode", 4, 1, 128, batches=7, tokens=20),
    },
)

LABELS = ("phase", "batch_size", "query_length", "context_length")

Samples = dict[tuple[str, ...], float]


def samples(text: str) -> Samples:
    """Values by name and labels' values."""
    return {
        (sample.name, *(sample.labels[each] for each in LABELS if each in sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def text(metrics: Metrics) -> str:
    async def in_a_loop() -> bytes:
        return metrics.text()

    return asyncio.run(in_a_loop()).decode()


def test_the_engines_numbers() -> None:
    expected = {
        ("furiosa_running",): 2,
        ("furiosa_waiting",): 1,
        ("furiosa_kv_blocks",): 9,
        ("furiosa_kv_blocks_used",): 5,
        ("furiosa_prompt_tokens_total",): 80,
        ("furiosa_cached_prompt_tokens_total",): 20,
        ("furiosa_preemptions_total",): 3,
        ("furiosa_draft_proposals_total",): 4,
        ("furiosa_draft_proposed_tokens_total",): 12,
        ("furiosa_draft_accepted_tokens_total",): 7,
        ("furiosa_bucket_batches_total", "prefill", "1", "32", "32"): 2,
        ("furiosa_bucket_tokens_total", "prefill", "1", "32", "32"): 48,
        ("furiosa_bucket_places_total", "prefill", "1", "32", "32"): 64,
        ("furiosa_bucket_batches_total", "decode", "4", "1", "128"): 7,
        ("furiosa_bucket_tokens_total", "decode", "4", "1", "128"): 20,
        ("furiosa_bucket_places_total", "decode", "4", "1", "128"): 28,
    }
    found = samples(text(Metrics(lambda: STATS)))
    assert expected.items() <= found.items()
    assert sum(name[0].startswith("furiosa_bucket_") for name in found) == 6


def test_they_are_asked_for_when_they_are_read() -> None:
    now: list[EngineStats | None] = [None]
    metrics = Metrics(lambda: now[0])
    assert "furiosa_running" not in text(metrics)  # while there is no engine
    now[0] = STATS
    assert "furiosa_running 2.0" in text(metrics)


def test_the_use_of_buckets(running: Server) -> None:
    """A prompt of 5 tokens and 3 after it: one prefill, and two decode steps, as the last token is never run."""
    with running.http as http:
        before = samples(http.get("/metrics").text)
        body = {"model": "test", "prompt": [70, 71, 72, 73, 74], "max_tokens": 3, "ignore_eos": True}
        assert http.post("/v1/completions", json=body).status_code == 200
        after = samples(http.get("/metrics").text)
    changed = {name: after[name] - before[name] for name in after if name[0].startswith("furiosa_bucket")}
    prefill, decode = ("prefill", "1", "128", "128"), ("decode", "4", "1", "128")
    assert {name: change for name, change in changed.items() if change} == {
        ("furiosa_bucket_batches_total", *prefill): 1,
        ("furiosa_bucket_tokens_total", *prefill): 5,
        ("furiosa_bucket_places_total", *prefill): 128,
        ("furiosa_bucket_batches_total", *decode): 2,
        ("furiosa_bucket_tokens_total", *decode): 2,
        ("furiosa_bucket_places_total", *decode): 8,
    }
