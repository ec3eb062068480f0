"""The time that each bucket of an artifact takes when it is full, in an engine, with sampling."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.engine_args import EngineArgs
from furiosa_build.runtime.measurement.timing import ENOUGH, Timing
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.stats import BucketUse

_STEPS = 64
"""New tokens of a sequence in a decode bucket: enough that the first still runs when the last has been prefilled."""


@dataclass(frozen=True)
class BucketSpeed:
    """A bucket that is full.

    Attributes:
        name: Such as `decode-4x512`.
        tokens: The tokens that one run computes.
        timing: The time of a step of the engine that runs it; None if no prompts bring the engine to run it.
    """

    name: str
    tokens: int
    timing: Timing | None

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens a second; of prefill and append buckets, tokens of prompts."""
        return None if self.timing is None else self.tokens / self.timing.median


def bucket_args(artifact: Path) -> EngineArgs:
    """The arguments of an engine whose buckets can be filled: it shares no KV blocks and keeps none in reserve."""
    return EngineArgs(model=str(artifact), enable_prefix_caching=False, spare_blocks_ratio=0.0)


def measure_buckets(engine: LLMEngine, seconds: float) -> Iterator[BucketSpeed]:
    """Measures one bucket after the other, each until its median is stable or `seconds` are over.

    The engine has nothing else to do, and all KV blocks for it: see `bucket_args`. With a draft model a step is a
    proposal and its verification.
    """
    for name, use in engine.stats().buckets.items():
        yield _measure(engine, name, use, seconds)


def _measure(engine: LLMEngine, name: str, use: BucketUse, seconds: float) -> BucketSpeed:
    tokens = _replicas(engine) * use.batch_size * use.query_length
    limit = engine.artifact.generator_config.default_scheduler_config.max_processing_samples
    if _replicas(engine) * use.batch_size > limit:
        return BucketSpeed(name, tokens, None)
    drawn = random.Random(name)
    samples = _full_steps(engine, name, use, tokens, drawn)  # warms up
    begin = time.perf_counter()
    if samples:
        samples = []
        while len(samples) < ENOUGH or not Timing.of(samples).is_stable:
            samples += _full_steps(engine, name, use, tokens, drawn)
            if time.perf_counter() - begin > seconds:
                break
    return BucketSpeed(name, tokens, Timing.of(samples) if samples else None)


def _full_steps(engine: LLMEngine, name: str, use: BucketUse, full: int, drawn: random.Random) -> list[float]:
    """The seconds of those steps of as many equally long requests as the bucket takes that computed `full` tokens."""
    artifact, replicas = engine.artifact, _replicas(engine)
    config, vocabulary = artifact.generator_config, artifact.model_metadata.vocab_size
    longest = max(length for _, *_, length in (*config.prefill_buckets, *config.append_buckets))
    prompt = max(1, min(longest, use.context_length - (_STEPS if use.phase == "decode" else 0)))
    new = use.context_length - prompt if use.phase == "decode" else 1
    params = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True)
    for number in range(replicas * use.batch_size):
        tokens = [drawn.randrange(vocabulary) for _ in range(prompt)]
        engine.add_request(str(number), {"prompt_token_ids": tokens}, params)
    seconds: list[float] = []
    while engine.has_unfinished_requests():
        before = engine.stats().buckets[name]
        begin = time.perf_counter()
        engine.step()
        took = time.perf_counter() - begin
        after = engine.stats().buckets[name]
        if after.batches - before.batches == replicas and after.tokens - before.tokens == full:
            seconds.append(took)
    return seconds


def _replicas(engine: LLMEngine) -> int:
    return engine.artifact.parallel_config.data_parallel_size
