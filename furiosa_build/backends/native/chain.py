"""Chains of plans, joined into one program: one call of the library runs them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from furiosa_build.backends.chain import Link
from furiosa_build.backends.native import tensors
from furiosa_build.backends.native.encode import encode
from furiosa_build.backends.native.library import NUMBERS_OF_A_TENSOR, addresses
from furiosa_build.backends.native.memory import place
from furiosa_build.backends.native.program import NativeProgram, check_size
from furiosa_build.backends.native.tensors import HostTensor
from furiosa_build.backends.native.values import Buffer
from furiosa_build.ir.tensors import Layout


class NativeChain:
    """Programs of one library, joined. What they hand on to each other lies in the arena, behind what is their own."""

    def __init__(self, links: Sequence[Link], results: Sequence[str]) -> None:
        """Raises ValueError when a program is handed something of another size than it takes."""
        self._links = links  # with what lies at the addresses
        joined = _Joined(links, results)
        self._given, self._results = joined.given, joined.results
        self._addresses = addresses(joined.addresses)
        own = max(program.plan.arena for program in joined.programs)
        handed_on = place(joined.lives)
        arena = len(joined.addresses)
        views: list[int] = []
        code: list[int] = []
        for program, buffers in zip(joined.programs, joined.buffers, strict=True):
            places = [(at, 0) if isinstance(at, int) else (arena, own + at.place) for at in buffers]
            more, calls = encode(program.plan, [*places, (arena, 0)], len(views) // NUMBERS_OF_A_TENSOR)
            views += more
            code += calls
        self._pools = joined.programs[0].pools
        self._program = joined.programs[0].library.program(views, code, arena, own + handed_on)

    def run(self, given: dict[str, HostTensor]) -> dict[str, HostTensor]:
        for name, (number, size) in self._given.items():
            check_size(given[name], size)
            self._addresses[number] = given[name].address
        results = {name: tensors.empty(layout) for name, (_, layout) in self._results.items()}
        for name, (number, _) in self._results.items():
            self._addresses[number] = results[name].address
        self._program.run(self._pools.get(), self._addresses)
        return results


class _Joined:
    """The buffers of a chain, by number, and those of each program among them.

    Attributes:
        programs: In order.
        addresses: Of each buffer; 0 where a run says it.
        given: The buffer and the bytes of each tensor that a run is given.
        results: The buffer and the layout of each tensor that it gives.
        buffers: For each program, inputs, outputs and constants: a number, or what only the chain sees.
        lives: Of the latter, the first program that has it and the last.
    """

    def __init__(self, links: Sequence[Link], results: Sequence[str]) -> None:
        self.programs = [cast("NativeProgram", link.program) for link in links]
        self.addresses: list[int] = []
        self.given: dict[str, tuple[int, int]] = {}
        self.results: dict[str, tuple[int, Layout]] = {}
        self.buffers: list[list[int | Buffer]] = []
        self.lives: dict[Buffer, tuple[int, int]] = {}
        self._numbers: dict[int, int] = {}  # by address
        self._found: dict[str, tuple[int | Buffer, int]] = {}  # where a name's tensor is by now, and its bytes
        last = {name: number for number, link in enumerate(links) for name in link.outputs}
        for number, (link, program) in enumerate(zip(links, self.programs, strict=True)):
            inputs = [self._input(own, size, number) for own, size in zip(link.inputs, program.sizes, strict=True)]
            for name, layout in zip(link.outputs, program.outputs, strict=True):
                self._add_output(name, layout, number, name in results and last[name] == number)
            outputs = [self._found[name][0] for name in link.outputs]
            self.buffers.append([*inputs, *outputs, self._at(program.constants.address)])

    def _input(self, own: HostTensor | str, size: int | None, number: int) -> int | Buffer:
        if isinstance(own, HostTensor):
            check_size(own, size)
            return self._at(own.address)
        if size is None:
            raise ValueError(f"{own!r} is given for a KV cache")
        if own not in self._found:
            self.given[own] = self._new(), size
            self._found[own] = self.given[own]
        buffer, found = self._found[own]
        if found != size:
            raise ValueError(f"{own!r} has {found} bytes, and is taken for {size}")
        if isinstance(buffer, Buffer):
            self.lives[buffer] = self.lives[buffer][0], number
        return buffer

    def _add_output(self, name: str, layout: Layout, number: int, is_result: bool) -> None:
        if is_result:
            self.results[name] = self._new(), layout
            self._found[name] = self.results[name][0], layout.nbytes
        else:
            buffer = Buffer("arena", 0, layout.nbytes)
            self.lives[buffer] = number, number
            self._found[name] = buffer, layout.nbytes

    def _at(self, address: int) -> int:
        if address not in self._numbers:
            self._numbers[address] = self._new(address)
        return self._numbers[address]

    def _new(self, address: int = 0) -> int:
        self.addresses.append(address)
        return len(self.addresses) - 1
