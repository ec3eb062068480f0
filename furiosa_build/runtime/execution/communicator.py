"""Collectives between the ranks of an artifact, and sends from stage to stage: among threads or processes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from furiosa_build.backends.device import Device
from furiosa_build.ir.tensors import Layout


class PeerFailedError(RuntimeError):
    """Another rank has failed, so that this one cannot go on."""


class Communicator(Protocol):
    """One rank's end. Every rank of a stage calls the same methods in the same order, with tensors of its device."""

    stage: int
    rank: int

    def all_reduce(self, tensor: Any, device: Device[Any]) -> Any:
        """The sum of every rank's tensor."""
        ...

    def all_gather(self, tensor: Any, device: Device[Any]) -> Any:
        """Every rank's tensor side by side along the last dimension, in order of ranks."""
        ...

    def send(self, tensors: Mapping[str, Any], device: Device[Any]) -> None:
        """Gives tensors to the same rank of the next stage."""
        ...

    def receive(self, like: Mapping[str, Layout], device: Device[Any]) -> dict[str, Any]:
        """What the same rank of the stage before sends: tensors of these names and layouts."""
        ...


class _Group:
    """The ranks of one stage, in threads of this process."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks)
        self.tensors: list[Any] = [None] * ranks


class LocalCommunicator:
    """Ranks in threads of one process. Sums are in order of ranks, so they are the same every time."""

    def __init__(self, stage: int, rank: int, group: _Group, inbox: _Inbox, outbox: _Inbox) -> None:
        self.stage, self.rank = stage, rank
        self._group, self._inbox, self._outbox = group, inbox, outbox

    def all_reduce(self, tensor: Any, device: Device[Any]) -> Any:
        return self._done(device.sum(self._exchange(tensor)))

    def all_gather(self, tensor: Any, device: Device[Any]) -> Any:
        return self._done(device.concatenate(self._exchange(tensor)))

    def send(self, tensors: Mapping[str, Any], device: Device[Any]) -> None:
        del device
        self._outbox.put(dict(tensors))

    def receive(self, like: Mapping[str, Layout], device: Device[Any]) -> dict[str, Any]:
        del like, device
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

    def _exchange(self, tensor: Any) -> list[Any]:
        self._group.tensors[self.rank] = tensor
        self._wait()
        return self._group.tensors

    def _done(self, result: Any) -> Any:
        self._wait()  # all have read
        return result

    def _wait(self) -> None:
        try:
            self._group.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise PeerFailedError("another rank has failed") from error


_Inbox = queue.SimpleQueue[dict[str, Any] | None]


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
        import torch
        import torch.distributed as dist

        self._torch, self._dist = torch, dist
        if dist.get_world_size() != stages * ranks:
            raise ValueError(f"{dist.get_world_size()} processes for {stages} stages of {ranks} ranks")
        self._ranks = ranks
        self.stage, self.rank = divmod(dist.get_rank(), ranks)
        # Every process makes every group, in one order.
        groups = [dist.new_group(list(range(stage * ranks, (stage + 1) * ranks))) for stage in range(stages)]
        self._group = groups[self.stage]

    def all_reduce(self, tensor: Any, device: Device[Any]) -> Any:
        total = device.to_torch(tensor).clone()
        self._dist.all_reduce(total, group=self._group)
        return device.from_torch(total)

    def all_gather(self, tensor: Any, device: Device[Any]) -> Any:
        own = device.to_torch(tensor).contiguous()
        parts = [own.new_empty(own.shape) for _ in range(self._ranks)]
        self._dist.all_gather(parts, own, group=self._group)
        return device.concatenate([device.from_torch(part) for part in parts])

    def send(self, tensors: Mapping[str, Any], device: Device[Any]) -> None:
        for name in sorted(tensors):
            self._dist.send(device.to_torch(tensors[name]).contiguous(), dst=self._dist.get_rank() + self._ranks)

    def receive(self, like: Mapping[str, Layout], device: Device[Any]) -> dict[str, Any]:
        received = {name: device.allocate(like[name]) for name in sorted(like)}
        for tensor in received.values():
            self._dist.recv(device.to_torch(tensor), src=self._dist.get_rank() - self._ranks)
        return received

    def broadcast_from_last(self, array: NDArray[Any]) -> NDArray[Any]:
        """The last stage's array, in every process."""
        array = np.ascontiguousarray(array)
        self._dist.broadcast(self._torch.from_numpy(array.view(np.uint8)), src=self._dist.get_world_size() - 1)
        return array
