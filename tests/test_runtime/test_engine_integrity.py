"""An engine's internal state: what `check_integrity` finds, and when it is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from furiosa_build.runtime.engine import LLMEngine

from . import toy
from .scheduling import request as stray
from .stepping import greedy, run


def test_an_idle_engine_checks_its_state_in_debug_mode(for_hits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LLMEngine(for_hits)
    checked: list[int] = []
    original = LLMEngine.check_integrity
    monkeypatch.setattr(LLMEngine, "check_integrity", lambda self: (checked.append(1), original(self)))

    def serve() -> int:
        for name in "abc":
            engine.add_request(name, [1, 2], greedy(2))
        engine.abort_request("c")
        while engine.has_unfinished_requests():
            engine.step()
        return len(checked)

    monkeypatch.delenv("FURIOSA_DEBUG", raising=False)
    assert serve() == 0
    monkeypatch.setenv("FURIOSA_DEBUG", "1")
    assert serve() == 1
    engine.add_request("a", [1, 2], greedy(2))
    engine.abort_request("a")
    assert len(checked) == 2


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda replica: replica.scheduler.blocks._free.pop(), "KV blocks lost"),
        (lambda replica: replica.scheduler.blocks._counts.update({5: 1}), "counted are"),
        (lambda replica: replica.scheduler._queues.in_flight.add(stray("lost", 3)), "in flight are"),
        (lambda replica: setattr(replica.executor._runners[0], "num_slots", 4), "rank 0 has 4 KV slots"),
    ],
)
def test_an_idle_engine_notices_an_inconsistent_state(
    for_hits: Path, monkeypatch: pytest.MonkeyPatch, corrupt: Callable[[Any], object], message: str
) -> None:
    """Of the cache, the scheduler, the executor."""
    engine = LLMEngine(for_hits)
    monkeypatch.setenv("FURIOSA_DEBUG", "1")
    run(engine, [1, 2], greedy(2))
    corrupt(engine._replicas[0])
    engine.add_request("r", [3], greedy(1))
    with pytest.raises(RuntimeError, match=message):
        engine.step()


def test_check_integrity_finds_what_does_not_belong_together(for_hits: Path) -> None:
    def began() -> LLMEngine:
        engine = LLMEngine(for_hits)
        engine.add_request("r", [1], greedy())
        engine._replicas[0].fill()
        engine.check_integrity()
        return engine

    lost, slots = began(), began()
    lost._replicas[0].in_flight.clear()
    with pytest.raises(RuntimeError, match=r"batches of \[\] are under way, in flight are \['r'\]"):
        lost.check_integrity()
    slots._replicas[0].executor._runners[0].num_slots = 4
    with pytest.raises(RuntimeError, match="rank 0 has 4 KV slots, 260 are handed out"):
        slots.check_integrity()


def test_check_integrity_finds_a_thread_that_has_ended(toy_backend: toy.ToyBackend, tmp_path: Path) -> None:
    del toy_backend
    data = toy.artifact_data()
    data["parallel_config"]["data_parallel_size"] = 2
    engine = LLMEngine(toy.write_artifact(tmp_path / "two", data))
    engine.check_integrity()
    threads = [thread for replica in engine._replicas for thread in replica.executor._threads]
    threads[0].end()
    threads[0].join()
    with pytest.raises(RuntimeError, match="the thread of element 0 has ended"):
        engine.check_integrity()
    engine.close()


def test_check_integrity_finds_a_forgotten_request(engine: LLMEngine) -> None:
    engine.add_request("r", [1], greedy())
    engine._requests.clear()
    with pytest.raises(RuntimeError, match="of engine and schedulers are inconsistent"):
        engine.check_integrity()
