"""Whether a server under mixed load keeps its memory: `python benchmarks/soak.py ARTIFACT-or-RECIPE [KEY=VALUE ...]`.

Eight clients ask for five minutes, as a seed has it: texts at once and as streams, lists of texts, texts of 200 JSON
schemas (were each new, the words in them would fill a tokenizer's cache of 10,000 all the time), streams that are left
in their midst, what is malformed, tokens. The load pauses after the first minute and at the end; then memory (VmRSS)
is compared, and what requests must give back: KV blocks, coroutines, files.

Ends with exit status 1 if memory has grown by more than 2 %, or anything is not given back.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from serving import Server, fetch, serving

MOST_GROWTH = 1.02
FIRST_S = 60
CLIENTS = 8
WORDS = ("sea", "night", "house", "letter", "morning", "walk", "sister", "garden", "evening", "friend")
MALFORMED = (
    b"",
    b"{",
    b"[" * 9000,
    b'{"model": 1}',
    b'{"prompt": "\xff"}',
    b"NaN",
    b'{"a": 1, "a": 2}',
    b'"' * 200_000,
)


class Request(NamedTuple):
    """What a client asks; `leaves`: it goes after that many events."""

    kind: str
    path: str
    body: bytes
    leaves: int | None = None


def draw(chance: random.Random, model: str) -> Request:
    """The next request."""
    kind = chance.choice(("text", "stream", "list", "guided", "leaves", "malformed", "tokens"))
    prompt = " ".join(chance.choices(WORDS, k=chance.randrange(1, 30)))
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": chance.randrange(1, 60), "temperature": 1}
    if kind == "malformed":
        return Request(kind, "/v1/completions", chance.choice(MALFORMED))
    if kind == "tokens":
        return Request(kind, "/tokenize", json.dumps({"prompt": prompt * 50}).encode())
    if kind == "list":
        body = {"text": [prompt, prompt], "sampling_params": {"max_completion_tokens": chance.randrange(1, 60)}}
        return Request(kind, "/generate", json.dumps(body).encode())
    if kind == "guided":
        name = f"{chance.choice(WORDS)}{chance.randrange(20)}"
        schema = {
            "type": "object",
            "properties": {name: {"type": "array", "items": {"type": "integer"}, "maxItems": 3}},
            "required": [name],
            "additionalProperties": False,
        }
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "soak", "schema": schema}}
    if kind in ("stream", "leaves"):
        body |= {"stream": True, "logprobs": chance.randrange(5), "n": chance.randrange(1, 3)}
    if kind == "leaves":
        body |= {"max_tokens": 200, "ignore_eos": True}
        return Request(kind, "/v1/completions", json.dumps(body).encode(), leaves=chance.randrange(1, 20))
    return Request(kind, "/v1/completions", json.dumps(body).encode())


async def ask(port: int, request: Request) -> bool:
    """Whether the answer is the one to be expected."""
    events = 0
    status = 0
    async with fetch(port, request.path, request.body) as lines:
        async for line in lines:
            status = status or int(line.split()[1])
            events += line.startswith(b"data: {")
            if request.leaves is not None and events >= request.leaves:
                break
    return 400 <= status < 500 if request.kind == "malformed" else status == 200


async def load(server: Server, model: str, chance: random.Random, seconds: float, done: Counter[str]) -> None:
    """Asks for so long, and waits for what is under way then."""
    end = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < end:
            request = draw(chance, model)
            done[request.kind if await ask(server.port, request) else f"WRONG {request.kind}"] += 1

    async def tell() -> None:
        while True:
            await asyncio.sleep(15)
            print(f"  {end - time.monotonic():4.0f} s left  {memory(server) / 1e6:7.1f} MB  {done.total()} requests")

    telling = asyncio.create_task(tell())
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    telling.cancel()


def memory(server: Server) -> int:
    """Resident bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


async def held(server: Server) -> dict[str, float]:
    """What requests must give back, when it has stayed the same for a second."""
    names = ("furiosa_running", "furiosa_waiting", "furiosa_kv_blocks_used", "furiosa_tasks", "process_open_fds")
    found: list[dict[str, float]] = []
    while len(found) < 10 or found[-10:] != found[-1:] * 10:
        await asyncio.sleep(0.1)
        async with fetch(server.port, "/metrics") as lines:
            values = [line.decode().split() async for line in lines]
        found.append({each[0]: float(each[1]) for each in values if each and each[0] in names})
    return found[-1]


async def soak(server: Server, model: str, seconds: float, seed: int) -> bool:
    """Whether all is well."""
    chance, done = random.Random(seed), Counter[str]()
    await load(server, model, chance, min(FIRST_S, seconds / 2), done)
    before, first = await held(server), memory(server)
    print(f"after the first minute: {first / 1e6:.1f} MB, {before}")
    await load(server, model, chance, seconds - min(FIRST_S, seconds / 2), done)
    after, last = await held(server), memory(server)
    print(f"at the end: {last / 1e6:.1f} MB, {after}")
    print(f"requests: {dict(sorted(done.items()))}")
    print(f"memory: {last / first:.4f} of that after the first minute; at most {MOST_GROWTH}")
    return after == before and last <= MOST_GROWTH * first and not any(kind.startswith("WRONG") for kind in done)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("target", metavar="ARTIFACT-or-RECIPE")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="of a recipe")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_intermixed_args()
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)
    with serving(given.target, *given.overrides) as server:
        is_well = asyncio.run(soak(server, server.model, given.seconds, given.seed))
    print("all is well" if is_well else "NOT WELL")
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
