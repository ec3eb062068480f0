"""How fast a server is, by number of clients: `python benchmarks/serving.py ARTIFACT-or-RECIPE [KEY=VALUE ...]`.

Starts `furiosa-build serve` on a free port. Each client asks for one streamed text after the other, without a pause,
until `--requests`, and four for each client, are answered. Prompts and texts are of mixed lengths, drawn from a seed:
the same lengths for every number of clients, but other tokens, so that no prompt is known already.

Columns: texts and output tokens a second; time to the first token (ms) and per output token after it (ms), median
and 99th percentile. Clients and server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

from rich import box
from rich.console import Console
from rich.table import Table

from furiosa_build.backends.cpu import processor_name

CLIENTS = (1, 2, 4, 8, 16, 32, 64)
COLUMNS = ("texts/s", "tokens/s", "first median", "first p99", "token median", "token p99")
VERSIONS = ("furiosa-build", "torch", "fastapi", "uvicorn")
SHORTEST = 4
"""Tokens, of prompts and of texts."""


class Job(NamedTuple):
    """What a client asks for: a prompt, of tokens or of text, and the length of its continuation."""

    prompt: list[int] | str
    tokens: int


class Server(NamedTuple):
    """A server that is ready."""

    process: subprocess.Popen[str]
    port: int
    model: str
    artifact_id: str


@contextmanager
def serving(target: str, *arguments: str) -> Iterator[Server]:
    """A server of an artifact or a recipe, on a free port of the loopback address."""
    command = [sys.executable, "-c", "from furiosa_build.cli.main import main; main()", "serve", target, *arguments]
    process = subprocess.Popen([*command, "--port", "0"], stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        port = 0
        for line in process.stderr:
            said: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
            if said.get("message") == "listening":
                port = int(said["url"].rpartition(":")[2])
            elif said.get("message") == "ready":
                break
            elif said.get("level") != "info":
                sys.stderr.write(line)  # of the build, or why it does not start
        else:
            sys.exit(process.wait() or 1)
        # A pipe that nobody reads would hold the server up.
        threading.Thread(target=deque, args=(process.stderr, 0), daemon=True).start()
        yield Server(process, port, said["model"], said["artifact_id"])
    finally:
        process.terminate()
        process.wait()


def jobs(number: int, longest: tuple[int, int], clients: int, seed: int) -> list[Job]:
    """Of all lengths up to the longest prompt and the longest text, short ones more often."""
    lengths, tokens = random.Random(seed), random.Random(f"{seed} {clients}")

    def length(most: int) -> int:
        return int(SHORTEST * (most / SHORTEST) ** lengths.random())

    return [
        Job([tokens.randrange(10, 1000) for _ in range(length(longest[0]))], length(longest[1])) for _ in range(number)
    ]


@asynccontextmanager
async def fetch(port: int, path: str, body: bytes | None = None) -> AsyncIterator[asyncio.StreamReader]:
    """The lines of an answer, head included. A plain client, that costs little; leaving the context hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"%b %b HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b"
        % (b"GET" if body is None else b"POST", path.encode(), len(body or b""), body or b"")
    )
    try:
        yield reader
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def stream(port: int, body: dict[str, Any]) -> list[float]:
    """When each event of an answer came, the request's start first."""
    times, is_done = [time.perf_counter()], False
    async with fetch(port, "/v1/completions", json.dumps(body).encode()) as lines:
        async for line in lines:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
            is_done = is_done or line.startswith(b"data: [DONE]")
    if not is_done:
        raise RuntimeError(f"no whole answer; it ends with {line!r}")
    return times


class Measured(NamedTuple):
    """One text: seconds to the first token, and per token from there on; tokens."""

    first: float
    per_token: float | None
    tokens: int


async def measure(port: int, model: str, clients: int, work: Sequence[Job]) -> tuple[float, list[Measured]]:
    """The seconds that all took, and each."""
    left = iter(work)
    done: list[Measured] = []

    async def client() -> None:
        for job in left:
            body = {
                "model": model,
                "prompt": job.prompt,
                "max_tokens": job.tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
            }
            began, first, *others = await stream(port, body)
            per_token = (others[-1] - first) / (job.tokens - 1) if others else None
            done.append(Measured(first - began, per_token, job.tokens))

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - began, done


def summary(clients: int, seconds: float, done: Sequence[Measured]) -> dict[str, float]:
    """A row of the table."""
    first = [1000 * each.first for each in done]
    per_token = [1000 * each.per_token for each in done if each.per_token is not None]
    figures = (
        len(done) / seconds,
        sum(each.tokens for each in done) / seconds,
        statistics.median(first),
        p99(first),
        statistics.median(per_token),
        p99(per_token),
    )
    return {"clients": clients} | {name: round(value, 3) for name, value in zip(COLUMNS, figures, strict=True)}


def p99(values: Sequence[float]) -> float:
    """The least that 99 % do not exceed."""
    return sorted(values)[-(len(values) // 100) - 1]


def machine() -> dict[str, Any]:
    """What it was measured on."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "load": os.getloadavg()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("target", metavar="ARTIFACT-or-RECIPE")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="of a recipe")
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, metavar="N")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="at least (default: %(default)s)")
    parser.add_argument("--longest-prompt", type=int, metavar="TOKENS", help="default: half the context")
    parser.add_argument("--longest-text", type=int, metavar="TOKENS", help="default: a quarter of the context")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the figures as well")
    given = parser.parse_intermixed_args()

    found: dict[str, Any] = {
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS}
        | {"python": platform.python_version()},
        "seed": given.seed,
        "requests": given.requests,
        "rows": [],
    }
    table = Table(box=box.SIMPLE)
    for name in ("clients", *COLUMNS):
        table.add_column(name, justify="right")
    with serving(given.target, *given.overrides) as server:
        with urlopen(f"http://127.0.0.1:{server.port}/v1/models") as answer:
            [model] = json.load(answer)["data"]
        context = model["max_model_len"]
        longest = given.longest_prompt or context // 2, given.longest_text or context // 4
        found |= {"artifact_id": server.artifact_id, "model": server.model, "longest": longest}
        # What is made at the first request is not measured.
        asyncio.run(measure(server.port, server.model, 4, jobs(8, longest, 0, given.seed)))
        for clients in given.clients:
            work = jobs(max(given.requests, 4 * clients), longest, clients, given.seed)
            row = summary(clients, *asyncio.run(measure(server.port, server.model, clients, work)))
            found["rows"].append(row)
            table.add_row(str(clients), *(f"{row[name]:.1f}" for name in COLUMNS))
    Console().print(table)
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
