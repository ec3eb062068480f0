"""Which requests wait and which run."""

from __future__ import annotations

from bisect import insort

from furiosa_build.runtime.request import Request, TokenSequence
from furiosa_build.runtime.scheduling.kv_cache import BlockManager


class RequestQueues:
    """The unfinished requests of a scheduler. Those that run have KV blocks, those that wait have none.

    Args:
        blocks: The KV blocks.
        is_offline: Whether long prompts are served first, instead of early requests.

    Attributes:
        waiting: In the order in which they are to be admitted.
        running: In the order in which they take decode steps.
        in_flight: Running requests of batches that have not finished.
    """

    def __init__(self, blocks: BlockManager, is_offline: bool) -> None:
        self.blocks, self.is_offline = blocks, is_offline
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        # Requests, not their ids: that of one which leaves while it is in flight may be in use again.
        self.in_flight: set[Request] = set()
        self._leaving: set[Request] = set()
        self._arrivals = 0

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running) - len(self._leaving)

    def priority(self, request: Request) -> tuple[int, int]:
        """The rank of a request: the lowest is served first, and preempted last."""
        return -len(request.prompt_token_ids) if self.is_offline else 0, request.arrival

    def add(self, request: Request) -> None:
        """Queues a new request."""
        request.arrival = self._arrivals
        self._arrivals += 1
        insort(self.waiting, request, key=self.priority)

    def admit_head(self, number: int) -> None:
        """Moves the first of the waiting requests, which have got blocks, to the running ones."""
        self.running += self.waiting[:number]
        del self.waiting[:number]

    def requeue(self, request: Request) -> None:
        """Frees the blocks of a running request and queues it again; all its tokens are to be recomputed."""
        self.running.remove(request)
        self._free_blocks(request)
        request.num_computed = 0
        request.proposals = []
        insort(self.waiting, request, key=self.priority)

    def remove(self, request: Request) -> None:
        """Removes a request and frees its blocks; if it is in flight, once `land` is called."""
        if request in self.in_flight:
            self._leaving.add(request)
        elif request in self.running:
            self.running.remove(request)
            self._free_blocks(request)
        else:
            self.waiting.remove(request)

    def land(self, request: Request) -> bool:
        """Notes that a request is in flight no more. Returns whether it is still there."""
        self.in_flight.remove(request)
        if request not in self._leaving:
            return True
        self._leaving.remove(request)
        self.remove(request)
        return False

    def check_integrity(self) -> None:
        """Raises RuntimeError when requests and blocks are inconsistent."""
        self.blocks.check_integrity()
        if len({*self.running, *self.waiting}) != len(self.running) + len(self.waiting):
            raise RuntimeError("a request is queued twice")
        running = sorted(request.request_id for request in self.running)
        if not self._leaving <= self.in_flight <= set(self.running):
            in_flight = sorted(request.request_id for request in self.in_flight)
            raise RuntimeError(f"in flight are {in_flight}, but running are {running}")
        owners = [sequence for request in self.running for sequence in sequences_with_blocks(request)]
        if self.blocks.owners() != set(owners):
            raise RuntimeError(f"KV blocks of {self.blocks.owners()}, but running are {running}")
        self._check_slots()
        if any(request.num_computed for request in self.waiting):
            raise RuntimeError("a waiting request counts tokens as computed")

    def _check_slots(self) -> None:
        """Every computed token has a slot, and no two sequences are to write to the same."""
        written: set[int] = set()
        for request in self.running:
            for sequence in sequences_with_blocks(request):
                slots = self.blocks.slots(sequence).tolist()
                if len(slots) < request.num_computed:
                    raise RuntimeError(f"{request.request_id!r} has fewer KV slots than computed tokens")
                if len({len(sequence.tokens) for sequence in request.sequences}) > 1:
                    raise RuntimeError(f"the beams of {request.request_id!r} are of different lengths")
                to_write = set(slots[request.num_computed :])
                if to_write & written:
                    raise RuntimeError(f"{request.request_id!r} is to write to a slot that another sequence writes to")
                written |= to_write

    def _free_blocks(self, request: Request) -> None:
        for sequence in sequences_with_blocks(request):
            self.blocks.free(sequence)


def sequences_with_blocks(request: Request) -> list[TokenSequence]:
    """The sequences of a running request that have KV blocks: until the prompt is computed, the first alone."""
    return request.sequences if request.is_prompt_computed else request.sequences[:1]
