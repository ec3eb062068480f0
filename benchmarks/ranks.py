"""Ranks as threads of one process, or as a process each: `python benchmarks/ranks.py ARTIFACT [TOKENS]`.

The artifact has several ranks or stages and one replica. Prints milliseconds of a step, the median after the first
ten, and private memory of all processes together, for the same requests.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

from furiosa_build.artifact.reader import open_artifact
from furiosa_build.runtime import LLMEngine, SamplingParams

WARM_UP = 10


def measure(engine: LLMEngine, tokens: int) -> dict[str, float]:
    """Runs four requests to their end."""
    for i in range(4):
        engine.add_request(str(i), [1 + i, 2, 3, 4], SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    seconds = []
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin)
    return {"ms": 1000 * statistics.median(seconds[WARM_UP:]), "mb": _private() / 1e6}


def _private() -> int:
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in rollup if line.startswith("Private_"))


def rank(artifact: str, stages: int, ranks: int, tokens: int) -> None:
    """One process of several."""
    import torch
    import torch.distributed as dist

    from furiosa_build.runtime.execution.communicator import DistributedCommunicator

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // (stages * ranks)))
    dist.init_process_group("gloo")
    engine = LLMEngine(artifact, seed=0, communicator=DistributedCommunicator(stages, ranks))
    print(json.dumps(measure(engine, tokens)))
    dist.destroy_process_group()


def main(artifact: str, tokens: int) -> None:
    parallel = open_artifact(artifact).artifact.parallel_config
    stages, ranks = parallel.pipeline_parallel_size, parallel.tensor_parallel_size
    engine = LLMEngine(artifact, seed=0)
    threads = measure(engine, tokens)
    engine.close()
    print(f"{stages * ranks} threads    {threads['ms']:7.2f} ms a step   {threads['mb']:6.0f} MB")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(stages * ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "rank", artifact, str(stages), str(ranks), str(tokens)],
            env={**shared, "RANK": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(stages * ranks)
    ]
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]
    print(
        f"{stages * ranks} processes  {max(one['ms'] for one in found):7.2f} ms a step   "
        f"{sum(one['mb'] for one in found):6.0f} MB"
    )


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 200)
