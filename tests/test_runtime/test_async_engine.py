from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from furiosa_build.core import failpoints
from furiosa_build.core.errors import EngineFullError, UserError
from furiosa_build.runtime.async_engine import AsyncLLMEngine, EngineDeadError, _Stream
from furiosa_build.runtime.engine import LLMEngine, StepFailedError
from furiosa_build.runtime.engine_args import AsyncEngineArgs
from furiosa_build.runtime.request import RequestOutput, SamplingParams

from . import toy
from .stepping import greedy

# Longer than any test takes, so that a failure is one instead of a hang.
PATIENCE_S = 120


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))  # type: ignore[arg-type]


async def collect(engine: AsyncLLMEngine, prompt: Any, request_id: str, params: SamplingParams) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params, request_id)]


async def tokens(engine: AsyncLLMEngine, prompt: Any, request_id: str, max_tokens: int = 12) -> list[int]:
    outputs = await collect(engine, prompt, request_id, greedy(max_tokens))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs[-1].outputs[0].token_ids


@asynccontextmanager
async def started(artifact: Path, **arguments: Any) -> AsyncIterator[tuple[AsyncLLMEngine, LLMEngine]]:
    """An engine, and the one within. At the end nothing is under way, and every block is free."""
    inner = LLMEngine.from_engine_args(AsyncEngineArgs(model=str(artifact), **arguments))
    async with AsyncLLMEngine(lambda: inner) as engine:
        yield engine, inner
        await engine.abort("unknown")  # comes after all that was ordered before
        assert not inner.has_unfinished_requests()
        inner.check_integrity()
        for replica in inner._replicas:
            assert replica.scheduler.blocks.num_free == replica.scheduler.blocks.num_blocks
    assert not {"engine", "stage 0, rank 0"} & {thread.name for thread in threading.enumerate()}


class Gate:
    """Holds the engine's thread before its next step, so that what a test does meanwhile is done in time.

    `after`: how many steps it takes before that.
    """

    def __init__(self, engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
        self._free = after
        self._step, self.open, self.reached = engine.step, threading.Event(), threading.Event()
        monkeypatch.setattr(engine, "step", self.step)

    def step(self) -> list[RequestOutput]:
        self._free -= 1
        if self._free >= 0:
            return self._step()
        self.reached.set()
        assert self.open.wait(PATIENCE_S)
        return self._step()


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


def test_abort_ends_the_generator_and_no_other(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with started(toy_artifact) as (engine, inner):
            gate = Gate(inner, monkeypatch, after=2)
            other = asyncio.create_task(tokens(engine, [2], "b"))
            async with aclosing(engine.generate([1], greedy(20), "a")) as generator:
                await anext(generator)
                await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
                abort = asyncio.create_task(engine.abort("a"))
                await asyncio.sleep(0)
                gate.open.set()
                await abort
                assert "a" not in inner._requests
                assert [output.finished async for output in generator] == [False], "what was on its way"
            assert await other == toy.expected([2], 12)

    run(test)


def test_whoever_waits_for_an_abort_may_be_cancelled(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with started(toy_artifact) as (engine, inner):
            gate = Gate(inner, monkeypatch)
            request = asyncio.create_task(collect(engine, [1], "a", greedy()))
            await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
            abort = asyncio.create_task(engine.abort("a"))
            await asyncio.sleep(0)
            abort.cancel()
            gate.open.set()
            with pytest.raises(asyncio.CancelledError):
                await abort
            assert [output.finished for output in await request] in ([], [False]), "aborted all the same"
            assert await tokens(engine, [2], "b") == toy.expected([2], 12)

    run(test)


@pytest.mark.parametrize("how", ["aclose", "cancel", "forget"])
def test_a_consumer_that_stops_aborts_its_request(
    toy_artifact: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def test() -> None:
        async with started(toy_artifact) as (engine, inner):
            gate = Gate(inner, monkeypatch)
            generator = engine.generate([1], greedy(20), "a")
            task = asyncio.ensure_future(anext(generator))
            await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
            if how == "aclose":
                gate.open.set()
                await task
                gate.open.clear()
                await generator.aclose()
            else:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                if how == "forget":
                    del generator
            gate.open.set()
            assert await tokens(engine, [1], "a") == toy.expected([1], 12), "the id is free"

    run(test)


def test_a_step_that_fails_ends_the_requests_it_touched(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with started(toy_artifact, data_parallel_size=2) as (engine, inner):
            gate = Gate(inner, monkeypatch)
            names = ["a", "b", "bad", "c", "d"]
            tasks = [asyncio.create_task(tokens(engine, [n, 9], name)) for n, name in enumerate(names)]
            await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
            with monkeypatch.context() as patch:
                patch.setenv(failpoints.VARIABLE, "request:bad@step=errno:EIO")
                gate.open.set()
                with pytest.raises(StepFailedError, match="Input/output error") as raised:
                    await tasks[2]
            assert list(raised.value.errors) == ["bad"]
            assert isinstance(raised.value.__cause__, OSError)
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            texts = {name: end for name, end in zip(names, ended, strict=True) if isinstance(end, list)}
            # The others that were in its batch have ended too, with that error; the replica apart has gone on.
            assert len(texts) >= 2
            assert texts == {name: toy.expected([names.index(name), 9], 12) for name in texts}
            assert {type(end) for end in ended if not isinstance(end, list)} == {StepFailedError}
            assert await tokens(engine, [2, 9], "bad") == toy.expected([2, 9], 12), "the engine goes on"

    run(test)


def test_whoever_ends_in_a_step_that_fails_another_has_its_output(
    toy_backend: toy.ToyBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step gives no usable logits for one of two in its batch, and the other's last token."""
    del toy_backend
    table = toy.table()
    [state] = (row for row in range(toy.P) if torch.equal(table[row], toy.logits_after([1])))
    table[state] = float("nan")
    artifact = toy.write_artifact(tmp_path / "a", parameters=toy.default_parameters() | {"table": table})

    async def test() -> None:
        async with started(artifact) as (engine, inner):
            gate = Gate(inner, monkeypatch)
            first = asyncio.create_task(tokens(engine, [3], "first", 1))
            await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
            bad, good = (asyncio.create_task(tokens(engine, [n], str(n), 1)) for n in (1, 2))
            await asyncio.sleep(0)
            gate.open.set()
            with pytest.raises(StepFailedError, match="no usable maximum"):
                await bad
            assert [await first, await good] == [toy.expected([3], 1), toy.expected([2], 1)]
            assert inner.stats().buckets["prefill-4x8"].tokens == 2, "they were in one batch"

    run(test)


def test_what_is_refused_is_raised_in_its_own_generator(toy_artifact: Path) -> None:
    async def test() -> None:
        async with started(toy_artifact) as (engine, _):
            other = asyncio.create_task(tokens(engine, [1], "a"))
            with pytest.raises(UserError, match="the prompt is empty"):
                await tokens(engine, [], "b")
            with pytest.raises(UserError, match="258 is not a token id"):
                await tokens(engine, [toy.VOCAB], "b")
            assert await other == toy.expected([1], 12)

    run(test)


def test_an_id_in_use_is_refused_and_its_owner_goes_on(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with started(toy_artifact) as (engine, inner):
            gate = Gate(inner, monkeypatch)
            owner = asyncio.create_task(tokens(engine, [1], "a", 40))  # more steps than the second needs to end
            await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
            second = asyncio.create_task(tokens(engine, [2], "a"))
            await asyncio.sleep(0)  # its order is placed before the step ends
            gate.open.set()
            with pytest.raises(UserError, match="'a' is in use"):
                await second
            assert await owner == toy.expected([1], 40)

    run(test)


def test_more_than_it_processes_is_refused_as_such(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        # Of all replicas together.
        async with started(toy_artifact, max_processing_samples=2, data_parallel_size=2) as (engine, inner):
            gate = Gate(inner, monkeypatch)
            first = asyncio.create_task(tokens(engine, [1], "a"))
            await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
            others = [asyncio.create_task(tokens(engine, [2], name)) for name in "bc"]
            await asyncio.sleep(0)
            gate.open.set()
            with pytest.raises(EngineFullError, match="2 requests are under way"):
                await others[1]
            assert [await first, await others[0]] == [toy.expected([1], 12), toy.expected([2], 12)]
            assert await tokens(engine, [3], "c") == toy.expected([3], 12)

    run(test)


def test_shutdown_ends_what_is_pending_with_an_error(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        inner = LLMEngine(toy_artifact)
        engine = AsyncLLMEngine(lambda: inner)
        gate = Gate(inner, monkeypatch)
        tasks = [asyncio.create_task(tokens(engine, [n], str(n), 20)) for n in range(3)]
        await asyncio.to_thread(gate.reached.wait, PATIENCE_S)
        ending = asyncio.create_task(engine.shutdown())
        await asyncio.sleep(0)
        # Orders that come behind the last one which the thread obeys.
        behind = asyncio.create_task(tokens(engine, [3], "behind"))
        aborting = asyncio.create_task(engine.abort("0"))
        await asyncio.sleep(0)
        gate.open.set()
        await ending
        await aborting
        tasks.append(behind)
        for task in tasks:
            with pytest.raises(EngineDeadError, match="was shut down"):
                await task
        assert not inner.has_unfinished_requests()
        with pytest.raises(EngineDeadError, match="was shut down"):
            await tokens(engine, [1], "late")
        await engine.abort("late")
        await engine.shutdown()

    run(test)


def test_an_error_outside_any_batch_ends_the_engine(toy_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        inner = LLMEngine(toy_artifact)
        async with AsyncLLMEngine(lambda: inner) as engine:

            def broken() -> None:
                raise RuntimeError("books do not agree")

            monkeypatch.setattr(inner, "step", broken)
            for name in "ab":
                with pytest.raises(EngineDeadError, match="has failed: books do not agree"):
                    await tokens(engine, [1], name)

    run(test)


def test_outputs_to_a_loop_that_is_closed_are_dropped(toy_artifact: Path) -> None:
    engine = AsyncLLMEngine(lambda: LLMEngine(toy_artifact))

    async def leave() -> None:
        generator = engine.generate([1], greedy(20), "a")
        await anext(generator)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)

    asyncio.run(leave())

    async def test() -> None:
        async with engine:
            assert await tokens(engine, [2], "b") == toy.expected([2], 12)

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
