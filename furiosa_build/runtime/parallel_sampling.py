"""Several completions of one prompt: what is one request to its caller is several to the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from furiosa_build.runtime.pooling import PoolingParams
from furiosa_build.runtime.request import CompletionOutput, RequestOutput
from furiosa_build.runtime.sampling.params import SamplingParams

_Params = TypeVar("_Params", bound=SamplingParams | PoolingParams)


@dataclass
class _Group:
    request_id: str
    parts: Sequence[str]
    latest: dict[int, RequestOutput] = field(default_factory=dict)

    @property
    def output(self) -> RequestOutput:
        """The completions so far, in order of their indices."""
        states = [self.latest[index] for index in sorted(self.latest)]
        completions: list[CompletionOutput] = []
        for index in sorted(self.latest):
            completions += [replace(each, index=index) for each in self.latest[index].outputs]
        is_finished = len(states) == len(self.parts) and all(state.finished for state in states)
        return replace(states[0], request_id=self.request_id, outputs=completions, finished=is_finished)


class ParallelRequests:
    """The requests under way that are for several completions."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}
        self._group_of: dict[str, tuple[_Group, int]] = {}

    def __contains__(self, request_id: str) -> bool:
        """Whether the id is that of one of them, or of a part of one."""
        return request_id in self._groups or request_id in self._group_of

    def add(self, request_id: str, parts: Sequence[str]) -> None:
        """Takes note of a request whose parts are under way by these ids."""
        if len(parts) > 1:
            group = self._groups[request_id] = _Group(request_id, parts)
            self._group_of.update((part, (group, index)) for index, part in enumerate(parts))

    def parts_of(self, request_id: str) -> Sequence[str]:
        """The ids by which the engine knows a request."""
        return self._groups[request_id].parts if request_id in self._groups else [request_id]

    def request_of(self, part: str) -> str:
        """The id by which its caller knows a request of the engine."""
        return self._group_of[part][0].request_id if part in self._group_of else part

    def merge(self, outputs: Iterable[RequestOutput]) -> list[RequestOutput]:
        """The outputs of a step as callers get them: one for each of their requests."""
        merged: dict[str, RequestOutput] = {}
        for output in outputs:
            found = self._group_of.get(output.request_id)
            if found is not None:
                group, index = found
                group.latest[index] = output
                output = group.output
            merged[output.request_id] = output
        for output in merged.values():
            if output.finished:
                self.drop(output.request_id)
        return list(merged.values())

    def drop(self, request_id: str) -> None:
        """Forgets a request."""
        if (group := self._groups.pop(request_id, None)) is not None:
            for part in group.parts:
                del self._group_of[part]


def split(request_id: str, params: _Params) -> list[tuple[str, _Params]]:
    """What the engine is to do for a request: ids and parameters, one for each completion.

    Each has random numbers of its own: from a seed that derives from the request's and its index, or from its id.
    """
    if not isinstance(params, SamplingParams) or params.n == 1 or params.use_beam_search:
        return [(request_id, params)]
    return [
        (
            f"{index}_{request_id}",
            replace(
                params,
                n=1,
                seed=_seed(params.seed, index),
                prompt_logprobs=params.prompt_logprobs if index == 0 else None,
            ),
        )
        for index in range(params.n)
    ]


def _seed(seed: int | None, index: int) -> int | None:
    if seed in (None, -1) or index == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "little") >> 1
