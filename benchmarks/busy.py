"""How much of its speed an engine keeps beside a busy process a core: `python benchmarks/busy.py ARTIFACT [BATCH]`.

Rounds alone and beside them take turns. Prints the mean time (ms) of a decode step of BATCH sequences (default: 1) in
both, and the rate that is left: half would be its share of the processor.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from furiosa_build.runtime import EngineArgs, LLMEngine, SamplingParams

ROUNDS, STEPS, PROMPT_TOKENS = 5, 48, 16


def main(artifact: str, batch: int) -> None:
    engine = LLMEngine.from_engine_args(EngineArgs(model=artifact))
    decode(engine, batch)  # warms up
    alone, beside = [], []
    for _ in range(ROUNDS):
        alone += decode(engine, batch)
        with busy_processes(len(os.sched_getaffinity(0))):
            beside += decode(engine, batch)
    engine.close()
    idle, busy = 1e3 * statistics.fmean(alone), 1e3 * statistics.fmean(beside)
    print(f"{idle:.2f} ms alone, {busy:.2f} ms beside a busy process a core: {idle / busy:.0%} of the rate")


def decode(engine: LLMEngine, batch: int) -> list[float]:
    """Seconds of each step in which all sequences take a token."""
    params = SamplingParams(temperature=0, max_tokens=STEPS + batch, ignore_eos=True)
    for number in range(batch):
        prompt = [17 * number + token for token in range(PROMPT_TOKENS)]
        engine.add_request(f"{time.monotonic_ns()}-{number}", {"prompt_token_ids": prompt}, params)
    times = []
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        if len(engine.step()) == batch:
            times.append(time.perf_counter() - begin)
    return times[1:STEPS]


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Processes that compute without a pause."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
