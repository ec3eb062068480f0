"""What every program of this directory does: time a model that it has loaded. Each runs in an environment of its own.

    run_NAME.py prepare MODEL WORK FORMAT CASES    makes what is loaded, in WORK, from MODEL (safetensors, bfloat16)
    run_NAME.py measure MODEL WORK FORMAT CASES    loads and times it

The last line that each prints is JSON. So are the CASES:

    {"prefill": [tokens, ...], "decode": [[batch, context], ...], "steps": 16}
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], Iterator[None]]
"""Continues all prompts greedily by a number of tokens. Yields when each has its first token, then after each step."""


@dataclass(frozen=True)
class Task:
    """A model of safetensors, the directory for what is made of it, and the number format.

    `prompts` are the lengths of the prompts that are measured, from the shortest; `longest` is the number of tokens of
    the longest sequence.
    """

    model: Path
    work: Path
    format: str
    prompts: list[int]
    longest: int


THREADS = len(os.sched_getaffinity(0))


def main(load: Callable[[Task], Generate], prepare: Callable[[Task], None] | None = None) -> None:
    """Runs the command line. There is nothing to prepare for an engine that loads what it is given."""
    what, model, work, format_, cases = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5]
    wanted = json.loads(cases)
    task = Task(model, work, format_, prompts(wanted), prompts(wanted)[-1] + wanted["steps"] + MARGIN + 2)
    work.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    if what == "prepare":
        if prepare is not None:
            prepare(task)
        found = {"seconds": time.perf_counter() - begin}
    else:
        generate = load(task)
        found = {"load": time.perf_counter() - begin, **measure(generate, wanted)}
    print("\n" + json.dumps({**found, "memory": peak_memory()}), flush=True)
    os._exit(0)  # threads that an engine leaves behind are not waited for


MARGIN = 100
"""Tokens that requests of an engine with a scheduler get beyond those that are measured: the first still runs when the
last has its first token."""


def step_through(engine: Any, names: list[str], steps: int) -> Iterator[None]:
    """What `Generate` does, for an engine with vLLM's interface that has these requests."""
    waiting, done = set(names), 0
    while done <= steps and engine.has_unfinished_requests():
        waiting -= {output.request_id for output in engine.step() if output.outputs[0].token_ids}
        if not waiting:
            done += 1
            yield
    engine.abort_request(names)


def peak_memory() -> int:
    """Bytes: the largest of this process and of those that it has started."""
    # Not its own ru_maxrss, which begins with that of the process that has started it.
    own = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * max(int(own.split()[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def prompts(cases: dict) -> list[int]:
    """The lengths of all prompts, from the shortest."""
    return sorted({*cases["prefill"], *(context for _, context in cases["decode"])})


def measure(generate: Generate, cases: dict) -> dict:
    """Seconds to the first token by length of the prompt, and of a step by "BATCHxCONTEXT": medians."""
    numbers = random.Random(0)

    def draw(batch: int, tokens: int) -> list[list[int]]:
        return [[numbers.randrange(300, 4000) for _ in range(tokens)] for _ in range(batch)]

    for _ in generate(draw(1, 16), 3):  # warms up
        pass
    first, step = {}, {}
    for tokens in cases["prefill"]:
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            next(iter_ := generate(draw(1, tokens), 1))
            times.append(time.perf_counter() - begin)
            for _ in iter_:
                pass
        first[str(tokens)] = min(times)
    for batch, context in cases["decode"]:
        times = []
        for _ in generate(draw(batch, context), cases["steps"]):
            times.append(time.perf_counter())
        step[f"{batch}x{context}"] = statistics.median(b - a for a, b in pairwise(times))
    return {"prefill": first, "decode": step}
