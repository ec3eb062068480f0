"""How long it takes to choose a token: `python benchmarks/sampling.py [--write]`.

Milliseconds of processor time a row, of one thread, the median of many: for each option alone and for what is usual
together, by vocabulary and rows of a batch. The logits are those of a model that hesitates between some hundred tokens;
`flat` ones are nearly equal, and the nucleus of top_p is half of the vocabulary. `--write` puts the table into
docs/performance.md.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from furiosa_build.backends.cpu import processor_name
from furiosa_build.runtime.sampling.params import SamplingParams
from furiosa_build.runtime.sampling.sampler import Random, sample, top_logprobs
from furiosa_build.runtime.sampling.selection import Floats

DOCUMENT = Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- sampling: begin -->", "<!-- sampling: end -->"
VOCABULARIES = (32_768, 131_072, 262_144)
BATCHES = (1, 32)
RUNS = 40
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature=0.7": {"temperature": 0.7},
    "top_k=50": {"top_k": 50},
    "top_p=0.9": {"top_p": 0.9},
    "top_p=0.9, flat": {"top_p": 0.9},
    "min_p=0.05": {"min_p": 0.05},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "a guide that allows half": {},
    "logprobs=5": {},
    "temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.1": {
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
    },
}


def main(writes: bool) -> None:
    columns = [f"{vocabulary // 1024}k, {rows}" for vocabulary in VOCABULARIES for rows in BATCHES]
    lines = ["| vocabulary, rows | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for option in OPTIONS:
        times = [milliseconds(option, vocabulary, rows) for vocabulary in VOCABULARIES for rows in BATCHES]
        lines.append(f"| {option} | " + " | ".join(f"{each:.2f}" for each in times) + " |")
        print(lines[-1], flush=True)
    machine = f"{processor_name()}, one thread, {time.strftime('%Y-%m-%d')}; a prompt of 2048 tokens, output of 512."
    table = "\n".join([machine, "", *lines])
    print(f"\n{table}")
    if writes:
        before, rest = DOCUMENT.read_text().split(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def milliseconds(option: str, vocabulary: int, rows: int) -> float:
    """Of one row, when so many are sampled one after the other."""
    random = np.random.default_rng(0)
    scale = 0.5 if option.endswith("flat") else 1.5
    logits: Floats = (random.normal(size=(rows, vocabulary)) * scale).astype(np.float32)
    if scale > 1:
        logits[:, random.integers(vocabulary, size=300)] += np.float32(10)
    params = SamplingParams(**OPTIONS[option])
    allowed = random.random(vocabulary) < 0.5 if option.startswith("a guide") else None
    prompt, output = random.integers(vocabulary, size=2048), random.integers(vocabulary, size=512).tolist()
    generator, found = Random(0), []
    for _ in range(RUNS):
        begin = time.thread_time()
        for row in logits:
            token = sample(row, params, prompt=prompt, output=output, allowed=allowed, generator=generator)
            if option.startswith("logprobs"):
                top_logprobs(row, token, 5)
        found.append((time.thread_time() - begin) / rows)
    return 1000 * median(found)


if __name__ == "__main__":
    main("--write" in sys.argv[1:])
