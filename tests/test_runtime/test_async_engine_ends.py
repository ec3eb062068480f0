"""How requests of an engine for asyncio end, and the engine itself: aborted, refused, failed, shut down."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
import torch

from furiosa_build.core import failpoints
from furiosa_build.core.errors import EngineFullError, UserError
from furiosa_build.runtime.async_engine import AsyncLLMEngine, EngineDeadError
from furiosa_build.runtime.engine import LLMEngine, StepFailedError

from . import toy
from .async_stepping import PATIENCE_S, Gate, collect, run, started, tokens
from .stepping import greedy


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
                raise RuntimeError("internal state inconsistent")

            monkeypatch.setattr(inner, "step", broken)
            for name in "ab":
                with pytest.raises(EngineDeadError, match="has failed: internal state inconsistent"):
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
