from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch

from furiosa_build.core.errors import UserError
from furiosa_build.runtime.async_engine import AsyncLLMEngine, _Stream
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.engine_args import AsyncEngineArgs
from furiosa_build.runtime.request import RequestOutput

from . import toy
from .async_stepping import PATIENCE_S, Gate, collect, run, started, tokens
from .stepping import greedy


def test_a_request_is_a_generator_of_outputs(toy_artifact: Path) -> None:
    async def test() -> None:
        async with started(toy_artifact) as (engine, _):
            assert engine.artifact.metadata.name == "toy"
            assert engine.tokenizer is not None
            outputs = await collect(engine, [1, 2, 3], "a", greedy())
            whole = outputs[-1].outputs[0].token_ids
            assert whole == toy.expected([1, 2, 3], 12)
            lengths = [len(output.outputs[0].token_ids) for output in outputs]
            assert lengths == sorted(set(lengths)), "each has more than the one before"
            assert all(output.outputs[0].token_ids == whole[:n] for output, n in zip(outputs, lengths, strict=True))

    run(test)


def test_it_is_loaded_in_the_thread_that_takes_the_steps(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's team of OpenMP, idle since, would make the steps several times slower."""
    threads = []
    step = LLMEngine.step

    def watched_step(engine: LLMEngine) -> list[RequestOutput]:
        threads.append(threading.current_thread().name)
        return step(engine)

    def load() -> LLMEngine:
        threads.append(threading.current_thread().name)
        return LLMEngine(toy_artifact)

    async def test() -> None:
        monkeypatch.setattr(LLMEngine, "step", watched_step)
        async with AsyncLLMEngine(load) as engine:
            assert await tokens(engine, [1], "a", 1) == toy.expected([1], 1)

    run(test)
    assert len(threads) >= 2
    assert set(threads) == {"engine"}


def test_it_computes_with_as_many_threads_as_its_maker(toy_artifact: Path) -> None:
    """Whatever other threads, such as the ranks of another engine, have set for themselves."""
    found = []

    def load() -> LLMEngine:
        found.append(torch.get_num_threads())
        return LLMEngine(toy_artifact)

    async def test() -> None:
        async with AsyncLLMEngine(load):
            pass

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        other = threading.Thread(target=torch.set_num_threads, args=(1,))
        other.start()
        other.join()
        run(test)
    finally:
        torch.set_num_threads(before)
    assert found == [3]


def test_what_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        AsyncLLMEngine(lambda: LLMEngine(tmp_path))
    with pytest.raises(UserError, match=str(tmp_path)):
        AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model=str(tmp_path)))
    for thread in threading.enumerate():
        if thread.name == "engine":
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


def test_an_output_is_given_out_before_the_next_step_ends(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with started(toy_artifact) as (engine, inner), aclosing(engine.generate([1], greedy(3), "a")) as outputs:
            gate = Gate(inner, monkeypatch, after=1)
            first = await anext(outputs)
            assert (first.finished, gate.open.is_set()) == (False, False)
            assert first.outputs[0].token_ids == toy.expected([1], 1)
            gate.open.set()
            assert [output.finished async for output in outputs][-1]

    run(test)


def test_what_has_come_before_an_error_is_given_out_first(toy_artifact: Path) -> None:
    engine = LLMEngine(toy_artifact)
    engine.add_request("a", [1], greedy())
    [output] = engine.step()

    async def test() -> None:
        stream = _Stream(asyncio.get_running_loop())
        stream.put(output)
        stream.fail(ValueError("later"))
        assert await stream.next() is output
        with pytest.raises(ValueError, match="later"):
            await stream.next()

    run(test)


def test_many_at_once(toy_artifact: Path) -> None:
    async def test() -> None:
        async with started(toy_artifact, devices="cpu", data_parallel_size=2) as (engine, _):
            found = await asyncio.gather(*(tokens(engine, [n, 7], str(n), 1 + n % 12) for n in range(40)))
            assert found == [toy.expected([n, 7], 1 + n % 12) for n in range(40)]

    run(test)


def test_the_loop_is_free_while_a_step_runs(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with started(toy_artifact) as (engine, inner):
            gate = Gate(inner, monkeypatch)
            one = asyncio.create_task(tokens(engine, [1], "a"))
            await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
            # The step waits for what only this coroutine does: were the loop blocked, it would not come to it.
            two = asyncio.create_task(tokens(engine, [2], "b"))
            await asyncio.sleep(0)
            gate.open.set()
            assert [await one, await two] == [toy.expected([1], 12), toy.expected([2], 12)]

    run(test)


def test_a_slow_consumer_is_given_the_newest_state(toy_artifact: Path) -> None:
    async def test() -> None:
        async with started(toy_artifact) as (engine, _), aclosing(engine.generate([1], greedy(), "slow")) as slow:
            first = await anext(slow)
            await tokens(engine, [2], "other", 20)  # ends after `slow` has, which came before
            rest = [output async for output in slow]
            assert len(rest) <= 1
            last = [first, *rest][-1]
            assert last.finished
            assert last.outputs[0].token_ids == toy.expected([1], 12)

    run(test)


def test_kinds_of_prompts(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    template = {"chat_template.jinja": "{% for m in messages %}{{ m.content }}|{% endfor %}"}
    artifact = toy.write_artifact(tmp_path / "a", model_files=template)

    async def test() -> None:
        async with started(artifact) as (engine, _):
            prompts: Sequence[Any] = ("abc", [97, 98, 99], [{"role": "user", "content": "hi"}])
            found = [(await collect(engine, prompt, str(n), greedy()))[-1] for n, prompt in enumerate(prompts)]
            assert [output.prompt_token_ids for output in found] == [list(b"abc")] * 2 + [list(b"hi|")]
            assert found[2].prompt == "hi|"
            assert found[2].outputs[0].token_ids == toy.expected(b"hi|", 12)

    run(test)
