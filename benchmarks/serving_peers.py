"""This project's server beside those that people would take instead.

`make peers`, then `python benchmarks/serving_peers.py`. The model of peers.py, 4 layers of it by default, is served by
each in turn, and measured as serving.py does: by clients that each ask for one streamed text after the other. Prompts
are of words that are a token each, of the same lengths for all. OpenVINO GenAI has no server of its own:
peer_programs/serve_openvino.py is a thin one. Prints a table of output tokens a second, and the median time to the
first token (ms); `--json FILE` writes all that was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from peers import PROGRAMS, REPOSITORY, SHAPES, Contestant, attempt, make_model
from serving import Job, jobs, machine, measure, summary

CLIENTS = (1, 8, 32)
LONGEST = 512, 128
"""Tokens of a prompt, and of a text."""
CASES = {"prefill": [64, 128, 256, 512], "decode": [[1, 512], [8, 512], [32, 512]], "steps": LONGEST[1]}
"""What peers.py's programs prepare for."""
SERVED = (
    ("furiosa_build", "bf16"),
    ("furiosa_build", "w8a8"),
    ("openvino", "int8"),
    ("vllm", "bf16"),
    ("llama_cpp", "q8_0"),
)
PATIENCE = 600
"""Seconds until a server answers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=48, help="texts, at least two for each client")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="furiosa-build-peers-") as directory:
        work = Path(directory)
        model = make_model(work / "model", given.shape, given.layers)
        contestants = [Contestant(engine, format_, work / f"{engine}-{format_}") for engine, format_ in SERVED]
        contestants = [one for one in contestants if one.is_installed]
        for one in contestants:
            attempt(one, "prepare", model, CASES)
        for number in range(given.rounds):
            for one in contestants:
                if one.failure is None:
                    one.rounds.append(serve_and_measure(one, model, given.requests, seed=number))
                    print(one.name, json.dumps(one.rounds[-1]), file=sys.stderr, flush=True)
    measured = {one.name: one.rounds for one in contestants if one.rounds}
    print(table(measured))
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": machine(), "measured": measured}, indent=1) + "\n")


def serve_and_measure(one: Contestant, model: Path, requests: int, seed: int) -> dict[str, Any]:
    """A row of serving.py's table for each number of clients."""
    words = single_words(model)
    with serving(one, model) as (port, name):

        def run(clients: int, work: Sequence[Job]) -> dict[str, float]:
            return summary(clients, *asyncio.run(measure(port, name, clients, work)))

        run(4, with_words(jobs(8, LONGEST, 0, seed), words, seed))
        return {
            str(clients): run(
                clients,
                with_words(
                    jobs(max(requests if clients > 1 else requests // 3, 2 * clients), LONGEST, clients, seed),
                    words,
                    clients,
                ),
            )
            for clients in CLIENTS
        }


def single_words(model: Path) -> list[str]:
    """Words that are one token each, a space before them."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    return sorted(token[1:] for token in vocabulary if token[0] == "Ġ" and token[1:].isalpha() and token[1:].isascii())


def with_words(work: Sequence[Job], words: Sequence[str], seed: int) -> list[Job]:
    """The same work, with prompts that are texts: not all servers take numbers of tokens."""
    drawn = random.Random(seed)
    return [job._replace(prompt="".join(f" {drawn.choice(words)}" for _ in job.prompt)) for job in work]


@contextmanager
def serving(one: Contestant, model: Path) -> Iterator[tuple[int, str]]:
    """Its server, ready: the port, and what the model is called."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = one.work.with_suffix(".log")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **ENVIRONMENTS.get(one.engine, {}),
    }
    with log.open("ab") as out:
        process = subprocess.Popen(command(one, model, port), env=environment, stdout=out, stderr=out, cwd=REPOSITORY)
        try:
            wait_for(f"http://127.0.0.1:{port}/v1/models", process, log)
            yield port, "peer"
        finally:
            process.terminate()
            process.wait()


THREADS = len(os.sched_getaffinity(0))
ENVIRONMENTS = {
    "vllm": {"VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}", "VLLM_CPU_KVCACHE_SPACE": "2"},
}


def command(one: Contestant, model: Path, port: int) -> list[str]:
    """Starts its server."""
    host = ["--host", "127.0.0.1", "--port", str(port)]
    longest = str(sum(LONGEST) + 8)
    match one.engine:
        case "furiosa_build":
            artifact = one.work / "artifacts" / "peer" / "latest"
            rest = [str(Path(sys.executable).parent / "furiosa-build"), "serve", str(artifact)]
            rest += ["--served-model-name", "peer"]
        case "vllm":
            rest = [str(one.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
            rest += ["--served-model-name", "peer", "--max-model-len", longest, "--max-num-seqs", "32"]
        case "llama_cpp":
            rest = [str(one.python), "-m", "llama_cpp.server", "--model", str(one.work / f"{one.format}.gguf")]
            rest += ["--model_alias", "peer", "--n_ctx", longest, "--n_threads", str(THREADS)]
            rest += ["--n_threads_batch", str(THREADS), "--n_batch", "512"]
        case _:
            return [str(one.python), str(PROGRAMS / f"serve_{one.engine}.py"), str(one.work), str(port)]
    return rest + host


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a server answers. Exits with the end of its log if it ends before."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    sys.exit(f"a server does not answer:\n{log.read_text(errors='replace')[-3000:]}")


def table(measured: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: medians of rounds."""
    heads = ["", *(f"{clients} clients: tokens/s, first ms" for clients in CLIENTS)]
    rows = []
    for name, rounds in measured.items():
        cells = [name]
        for clients in CLIENTS:
            rows_of = [each[str(clients)] for each in rounds]
            rate, first = (statistics.median(row[key] for row in rows_of) for key in ("tokens/s", "first median"))
            cells.append(f"{rate:.1f}, {first:.0f}")
        rows.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *rows])


if __name__ == "__main__":
    main()
