"""`num_threads` and `pin_threads`: what the threads that compute have, as they compute."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from furiosa_build.artifact.reader import OpenArtifact
from furiosa_build.artifact.stages import restage
from furiosa_build.backends.torch_device import TorchDevice
from furiosa_build.core.errors import UserError
from furiosa_build.runtime.engine import LLMEngine
from furiosa_build.runtime.engine_args import EngineArgs
from furiosa_build.runtime.execution.thread_shares import ThreadShare, divide

from . import toy
from .stepping import greedy

T = TypeVar("T")
Seen = dict[str, tuple[int, frozenset[int]]]
"""What threads that computed had, by their names: threads of torch, and cores."""


@pytest.fixture
def in_a_thread() -> Iterator[Callable[[Callable[[], T]], T]]:
    """Calls a function in a thread that ends with the test, and with it what was set for it."""
    with ThreadPoolExecutor(1, "caller") as executor:
        yield lambda function: executor.submit(function).result()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    found: Seen = {}
    run = toy.ToyProgram.run

    def watched(program: toy.ToyProgram, inputs: Sequence[Tensor]) -> list[Tensor]:
        found[threading.current_thread().name] = (torch.get_num_threads(), frozenset(os.sched_getaffinity(0)))
        return run(program, inputs)

    monkeypatch.setattr(toy.ToyProgram, "run", watched)
    return found


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four cores."""
    own: dict[threading.Thread, frozenset[int]] = {}
    me = threading.current_thread
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(own.get(me(), range(4))))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: own.update({me(): frozenset(cores)}))


def generate(artifact: str | Path | OpenArtifact, **arguments: Any) -> None:
    with closing(LLMEngine(artifact, **arguments)) as engine:
        engine.add_request("a", [1, 2, 3], greedy(4))
        while engine.has_unfinished_requests():
            engine.step()


def test_one_rank_computes_with_so_many_threads(
    toy_artifact: Path, seen: Seen, in_a_thread: Callable[[Callable[[], None]], None]
) -> None:
    in_a_thread(lambda: generate(toy_artifact, num_threads=3))
    assert [threads for threads, _ in seen.values()] == [3]


@pytest.mark.usefixtures("four_cores")
def test_stages_get_equal_shares_of_threads_and_cores(opened: OpenArtifact, seen: Seen) -> None:
    two = OpenArtifact(opened.directory, restage(opened.artifact, 2), opened.manifest)
    generate(two, num_threads=4, pin_threads=True)
    assert seen == {"element 0": (2, {0, 1}), "element 1": (2, {2, 3})}
    generate(two, num_threads=5)
    assert seen["element 1"] == (2, {0, 1, 2, 3})


@pytest.mark.usefixtures("four_cores")
def test_pinning_alone_takes_the_cores_that_there_are(
    toy_artifact: Path,
    seen: Seen,
    in_a_thread: Callable[[Callable[[], int]], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TorchDevice, "num_threads", lambda _: 2)
    in_a_thread(lambda: generate(toy_artifact, pin_threads=True) or 0)
    assert list(seen.values()) == [(2, {0, 1})]


@pytest.mark.usefixtures("four_cores")
def test_what_cannot_be_divided_is_refused() -> None:
    device = TorchDevice()
    with pytest.raises(UserError, match="num_threads=1: each of 2 ranks, of all stages and replicas, needs one"):
        divide(device, 2, num_threads=1, pinned=False)
    with pytest.raises(UserError, match="pin_threads: 6 threads cannot each have one of 4 cores") as error:
        divide(device, 2, num_threads=6, pinned=True)
    assert error.value.valid == "2 to 4"
    assert divide(device, 2, num_threads=6, pinned=False) == [ThreadShare(3)] * 2


def test_arguments_reach_the_engine(toy_artifact: Path) -> None:
    with pytest.raises(UserError, match="num_threads=0"):
        LLMEngine.from_engine_args(EngineArgs(model=str(toy_artifact), num_threads=0))
