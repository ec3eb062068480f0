"""Speculative decoding on and off: `python benchmarks/speculative.py ARTIFACT [TOKENS]`.

The artifact has a draft. Prints tokens per second, tokens per proposal and the share of accepted proposals, for 1 and
for as many requests as the largest decode bucket has places, greedy and sampled.
"""

from __future__ import annotations

import sys
import time

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.runtime import AsyncEngineArgs, LLMEngine, SamplingParams

PROMPT = "It is a truth universally acknowledged, that"


def measure(artifact: str, requests: int, temperature: float, tokens: int, number: int | None) -> str:
    """`number` of tokens are proposed at a time; None: without the draft."""
    args = AsyncEngineArgs(
        model=artifact, seed=0, num_speculative_tokens=number, use_speculative_decoding_if_possible=number is not None
    )
    engine = LLMEngine.from_engine_args(args)
    params = SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True)
    for warm in (True, False):
        begin = time.perf_counter()
        for i in range(requests):
            engine.add_request(f"{warm}-{i}", PROMPT, params)
        while engine.has_unfinished_requests():
            engine.step()
    seconds, stats = time.perf_counter() - begin, engine.stats()
    engine.close()
    shown = f"{requests * tokens / seconds:8.0f} tokens/s"
    if stats.tokens_per_proposal is None or stats.acceptance_rate is None:
        return shown
    return f"{shown}   {stats.tokens_per_proposal:4.2f} tokens a step   {stats.acceptance_rate:4.0%} accepted"


def main(artifact: str, tokens: int) -> None:
    config = open_artifact(artifact).artifact.generator_config
    if config.num_speculative_tokens is None:
        sys.exit(f"{artifact} has no draft")
    most = max(batch for batch, _ in config.decode_buckets)
    for requests in sorted({1, most}):
        for temperature in (0.0, 1.0):
            for number in (None, 2, config.num_speculative_tokens):
                named = f"{requests:3} requests, temperature {temperature:g}, {number or 'no'} proposals"
                print(f"{named:44}{measure(artifact, requests, temperature, tokens, number)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 64)
