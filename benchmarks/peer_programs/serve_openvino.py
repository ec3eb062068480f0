"""OpenVINO GenAI's continuous batching behind HTTP: `serve_openvino.py MODEL PORT`.

Answers POST /v1/completions with a stream, as the other servers do, so that one client measures all. Each step of the
pipeline is followed by the texts that have grown; requests come in between.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import openvino_genai

THREADS = len(os.sched_getaffinity(0))


class Engine:
    """The pipeline, stepped in a thread of its own as long as it has requests."""

    def __init__(self, model: str) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens, scheduler.max_num_seqs, scheduler.cache_size = 512, 32, 2
        properties = {"INFERENCE_NUM_THREADS": THREADS}
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._thread = ThreadPoolExecutor(1)
        self._requests: dict[int, tuple[object, asyncio.Queue[int]]] = {}
        self._numbers = itertools.count()
        self._work = asyncio.Event()

    async def add(self, prompt: str, max_tokens: int) -> asyncio.Queue[int]:
        """A queue of the numbers of tokens that a text has grown by; 0 at its end."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = max_tokens, True, False
        number, queue = next(self._numbers), asyncio.Queue()
        loop = asyncio.get_running_loop()
        handle = await loop.run_in_executor(self._thread, self._pipeline.add_request, number, prompt, config)
        self._requests[number] = handle, queue
        self._work.set()
        return queue

    async def run(self) -> None:
        """Steps for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            await loop.run_in_executor(self._thread, self._pipeline.step)
            for number, (handle, queue) in list(self._requests.items()):
                if handle.can_read():
                    queue.put_nowait(sum(len(output.generated_ids) for output in handle.read().values()))
                if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                    queue.put_nowait(0)
                    del self._requests[number]
            if not self._requests:
                self._work.clear()


async def main(model: str, port: int) -> None:
    engine = Engine(model)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        if "content-length:" in head and (length := int(head.split("content-length:")[1].split()[0])):
            body = json.loads(await reader.readexactly(length))
            tokens = await engine.add(body["prompt"], body["max_tokens"])
            while new := await tokens.get():
                writer.write(b"data: %b\n\n" % json.dumps({"tokens": new}).encode())
                await writer.drain()
            writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    async with server:
        await engine.run()


asyncio.run(main(sys.argv[1], int(sys.argv[2])))
