"""Chains: programs that run one after the other, with what they hand on by name. A rank has one between collectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from furiosa_build.backends.base import LoadedProgram


@dataclass(frozen=True)
class Link:
    """A program of a chain.

    Attributes:
        program: What runs.
        inputs: In its calling order: a tensor, which stays where it is, or the name of one that changes.
        outputs: The names of what it gives.
    """

    program: LoadedProgram
    inputs: Sequence[Any]
    outputs: Sequence[str]

    @property
    def reads(self) -> list[str]:
        """The names among its inputs."""
        return [given for given in self.inputs if isinstance(given, str)]


class Chain(Protocol):
    """A chain, ready to run; by one thread at a time."""

    def run(self, given: dict[str, Any]) -> dict[str, Any]:
        """What the chain was asked for, new tensors, from those that its links read and none of them gives.

        Takes `given` over. Raises ValueError for a tensor of another size than the program takes.
        """
        ...


class ProgramByProgram:
    """A chain whose tensors are freed as soon as no link reads them any more."""

    def __init__(self, links: Sequence[Link], results: Sequence[str]) -> None:
        self._results = results
        self._links: list[tuple[Link, list[str]]] = []
        needed = set(results)
        for link in reversed(links):
            self._links.insert(0, (link, sorted({*link.reads, *link.outputs} - needed)))
            needed = (needed - set(link.outputs)) | set(link.reads)

    def run(self, given: dict[str, Any]) -> dict[str, Any]:
        for link, last_used in self._links:
            inputs = [given[own] if isinstance(own, str) else own for own in link.inputs]
            given.update(zip(link.outputs, link.program.run(inputs), strict=True))
            del inputs
            for name in last_used:
                del given[name]
        return {name: given[name] for name in self._results}


def read_by(links: Sequence[Link]) -> set[str]:
    """The names that links read before any of them gives them."""
    names: set[str] = set()
    for link in reversed(links):
        names = (names - set(link.outputs)) | set(link.reads)
    return names
