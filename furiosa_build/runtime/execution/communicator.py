"""Collectives between the ranks of an artifact, and sends from stage to stage: among threads or processes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class PeerFailedError(RuntimeError):
    """Another rank has failed, so that this one cannot go on."""


class Communicator(Protocol):
    """One rank's end. Every rank of a stage calls the same methods in the same order."""

    stage: int
    rank: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor side by side along the last dimension, in order of ranks."""
        ...

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        """Gives tensors to the same rank of the next stage."""
        ...

    def receive(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the same rank of the stage before sends; `like` has empty tensors of the same names and shapes."""
        ...


class _Group:
    """The ranks of one stage, in threads of this process."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks)
        self.tensors: list[Tensor] = [torch.empty(0)] * ranks


class LocalCommunicator:
    """Ranks in threads of one process. Sums are in order of ranks, so they are the same every time."""

    def __init__(self, stage: int, rank: int, group: _Group, inbox: _Inbox, outbox: _Inbox) -> None:
        self.stage, self.rank = stage, rank
        self._group, self._inbox, self._outbox = group, inbox, outbox

    def all_reduce(self, tensor: Tensor) -> Tensor:
        parts = self._exchange(tensor)
        total = parts[0] + parts[1]
        for part in parts[2:]:
            total += part
        return self._done(total)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._done(torch.cat(self._exchange(tensor), dim=-1))

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        self._outbox.put(dict(tensors))

    def receive(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        del like
        received = self._inbox.get()
        if received is None:
            raise PeerFailedError("the stage before has failed")
        return received

    def abort(self) -> None:
        """Makes the other ranks fail, and the next stage, instead of waiting for ever."""
        self._group.barrier.abort()
        self._outbox.put(None)

    def reset(self) -> None:
        """Clears failures, and what was sent and not received. No rank may be running."""
        self._group.barrier.reset()
        while not self._inbox.empty():
            self._inbox.get()

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._group.tensors[self.rank] = tensor
        self._wait()
        return self._group.tensors

    def _done(self, result: Tensor) -> Tensor:
        self._wait()  # all have read
        return result

    def _wait(self) -> None:
        try:
            self._group.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise PeerFailedError("another rank has failed") from error


_Inbox = queue.SimpleQueue[dict[str, Tensor] | None]


def local_communicators(stages: int, ranks: int) -> list[LocalCommunicator]:
    """The communicators of each rank of each stage, in that order."""
    groups = [_Group(ranks) for _ in range(stages)]
    boxes: list[list[_Inbox]] = [[queue.SimpleQueue() for _ in range(ranks)] for _ in range(stages + 1)]
    return [
        LocalCommunicator(stage, rank, groups[stage], boxes[stage][rank], boxes[stage + 1][rank])
        for stage in range(stages)
        for rank in range(ranks)
    ]


class DistributedCommunicator:
    """Ranks in processes of `torch.distributed`, whose process group is initialised (gloo on CPUs).

    Process number `stage * ranks + rank` is that rank of that stage.
    """

    def __init__(self, stages: int, ranks: int) -> None:
        import torch.distributed as dist

        self._dist = dist
        if dist.get_world_size() != stages * ranks:
            raise ValueError(f"{dist.get_world_size()} processes for {stages} stages of {ranks} ranks")
        self._ranks = ranks
        self.stage, self.rank = divmod(dist.get_rank(), ranks)
        # Every process makes every group, in one order.
        groups = [dist.new_group(list(range(stage * ranks, (stage + 1) * ranks))) for stage in range(stages)]
        self._group = groups[self.stage]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        self._dist.all_reduce(total, group=self._group)
        return total

    def all_gather(self, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self._ranks)]
        self._dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return torch.cat(parts, dim=-1)

    def send(self, tensors: Mapping[str, Tensor]) -> None:
        for name in sorted(tensors):
            self._dist.send(tensors[name].contiguous(), dst=self._dist.get_rank() + self._ranks)

    def receive(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        received = {name: torch.empty_like(like[name]) for name in sorted(like)}
        for tensor in received.values():
            self._dist.recv(tensor, src=self._dist.get_rank() - self._ranks)
        return received

    def broadcast_from_last(self, tensor: Tensor) -> Tensor:
        """The last stage's tensor, in every process."""
        self._dist.broadcast(tensor, src=self._dist.get_world_size() - 1)
        return tensor
