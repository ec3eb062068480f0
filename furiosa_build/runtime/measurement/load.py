"""The throughput of an engine under a described load."""

from __future__ import annotations

import random
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.measurement.timing import Timing
from furiosa_build.runtime.sampling.params import SamplingParams


@dataclass(frozen=True)
class Load:
    """Requests of random tokens.

    Attributes:
        clients: How many at a time: when one is finished the next begins.
        requests: How many in all.
        input_tokens: Tokens of each prompt.
        output_tokens: New tokens of each.
    """

    clients: int
    requests: int
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Throughput:
    """How a load was served.

    Attributes:
        load: The load.
        seconds: How long it took.
        first_token: From a request's beginning to its first token.
        later_token: Between its tokens from there on: the mean of each request.
    """

    load: Load
    seconds: float
    first_token: Timing
    later_token: Timing | None

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second."""
        return self.load.requests * self.load.output_tokens / self.seconds


def measure_load(artifact: Path, load: Load) -> Throughput:
    """Serves a load with an engine as the artifact describes it. Raises UserError if it cannot be served."""
    with closing(LLMEngine(artifact)) as engine:
        return _serve(engine, load)


def _serve(engine: LLMEngine, load: Load) -> Throughput:
    drawn, vocabulary = random.Random(0), engine.artifact.model_metadata.vocab_size
    params = SamplingParams(
        temperature=0, max_tokens=load.output_tokens, min_tokens=load.output_tokens, ignore_eos=True
    )
    begun: dict[str, float] = {}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    begin = time.perf_counter()
    while len(begun) < load.requests or engine.has_unfinished_requests():
        while len(begun) < min(load.requests, len(last) + load.clients):
            tokens = [drawn.randrange(vocabulary) for _ in range(load.input_tokens)]
            name = str(len(begun))
            begun[name] = time.perf_counter()
            engine.add_request(name, {"prompt_token_ids": tokens}, params)
        for output in engine.step():
            now = time.perf_counter()
            first.setdefault(output.request_id, now)
            if output.finished:
                last[output.request_id] = now
    seconds = time.perf_counter() - begin
    later = load.output_tokens - 1
    return Throughput(
        load,
        seconds,
        Timing.of([first[name] - begun[name] for name in begun]),
        Timing.of([(last[name] - first[name]) / later for name in begun]) if later else None,
    )
