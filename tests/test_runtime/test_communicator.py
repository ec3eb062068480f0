from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from furiosa_build.backends.torch_device import TorchDevice
from furiosa_build.runtime.execution.communicator import LocalCommunicator, PeerFailedError, local_communicators

DEVICE = TorchDevice()


def test_sums_and_gathers_between_threads() -> None:
    ends = local_communicators(stages=1, ranks=3)

    def work(end: LocalCommunicator) -> list[torch.Tensor]:
        own = torch.full((2, 2), float(end.rank + 1))
        return [end.all_reduce(own, DEVICE) if step % 2 else end.all_gather(own, DEVICE) for step in range(50)]

    with ThreadPoolExecutor(3) as pool:
        for results in pool.map(work, ends):
            for step, result in enumerate(results):
                row = [6.0, 6.0] if step % 2 else [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
                assert result.tolist() == [row, row]


def test_a_stage_gives_to_the_same_rank_of_the_next() -> None:
    ends = {(end.stage, end.rank): end for end in local_communicators(stages=3, ranks=2)}
    for rank in range(2):
        ends[0, rank].send({"x": torch.tensor(rank)}, DEVICE)
    for rank in (1, 0):
        received = ends[1, rank].receive({}, DEVICE)
        assert received["x"].item() == rank
        ends[1, rank].send(received, DEVICE)
    assert [ends[2, rank].receive({}, DEVICE)["x"].item() for rank in range(2)] == [0, 1]


def test_when_one_fails_the_others_do_not_wait() -> None:
    first, second, third, _ = local_communicators(stages=2, ranks=2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second.all_reduce, torch.zeros(1), DEVICE)
        first.abort()
        with pytest.raises(PeerFailedError):
            waiting.result(timeout=60)
    with pytest.raises(RuntimeError, match="the stage before has failed"):
        third.receive({}, DEVICE)


def test_after_a_reset_nothing_of_a_failure_is_left() -> None:
    first, second, third, fourth = ends = local_communicators(stages=2, ranks=2)
    first.send({"x": torch.zeros(1)}, DEVICE)
    first.abort()
    for end in ends:
        end.reset()
    first.send({"x": torch.ones(1)}, DEVICE)
    assert third.receive({}, DEVICE)["x"].item() == 1.0
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(second.all_reduce, torch.ones(1), DEVICE)
        assert first.all_reduce(torch.ones(1), DEVICE).item() == 2.0
        assert other.result(timeout=60).item() == 2.0
    assert fourth.rank == 1
