"""Chains of any backend, program by program."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import ClassVar

from furiosa_build.backends.chain import Link, ProgramByProgram, read_by


class Number:
    """A tensor: of which there are as many as somebody holds."""

    alive: ClassVar[weakref.WeakSet[Number]] = weakref.WeakSet()

    def __init__(self, value: int) -> None:
        self.value = value
        self.alive.add(self)


class Add:
    """Gives the sum of its inputs, and notes what there is when it begins."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def run(self, inputs: Sequence[Number]) -> list[Number]:
        self.seen.append(sorted(number.value for number in Number.alive))
        return [Number(sum(number.value for number in inputs))]


def test_tensors_are_let_go_after_their_last_use() -> None:
    add, fixed = Add(), Number(100)
    links = [
        Link(add, ["a", "b"], ["c"]),
        Link(add, ["c", fixed], ["d"]),
        Link(add, ["d", "b"], ["unread"]),
        Link(add, ["d", "d"], ["c"]),
    ]
    assert read_by(links) == {"a", "b"}
    results = ProgramByProgram(links, ["c"]).run({"a": Number(1), "b": Number(2)})
    assert {name: number.value for name, number in results.items()} == {"c": 206}
    assert add.seen == [[1, 2, 100], [2, 3, 100], [2, 100, 103], [100, 103]]
    assert sorted(number.value for number in Number.alive) == [100, 206]
