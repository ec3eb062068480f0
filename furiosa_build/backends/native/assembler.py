"""Writes programs of operator `pointwise`: instructions on values without number, then registers for them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

from furiosa_build.backends.native.pointwise import INSTRUCTIONS, LOAD, MOST_REGISTERS, STORE

Kind = Literal["f", "i"]


class RegistersExhaustedError(Exception):
    """A program needs more values at a time than the machine has registers."""


@dataclass(frozen=True)
class Register:
    """A value that an instruction has computed.

    Attributes:
        number: Of the instruction.
        kind: "f": float32; "i": int64.
    """

    number: int
    kind: Kind


Argument = Register | float | int
"""A register, or a constant."""


class Assembler:
    """A program in the making. Equal instructions are written once."""

    def __init__(self) -> None:
        self._instructions: list[tuple[str, tuple[Argument, ...]]] = []
        self._known: dict[Hashable, Register] = {}
        self._constants: dict[float, int] = {}

    def load(self, tensor: int, kind: Kind) -> Register:
        """A tensor of the call, by its number among the operands."""
        return self._append(LOAD, (tensor,), kind)

    def emit(self, name: str, *arguments: Argument) -> Register:
        """An instruction. Arguments are converted to the kinds that it needs."""
        instruction = INSTRUCTIONS[name]
        pairs = zip(arguments, instruction.arguments, strict=True)
        given = tuple(self._as(argument, "f" if kind == "f" else "i") for argument, kind in pairs)
        return self._append(name, given, "f" if instruction.result == "f" else "i")

    def as_kind(self, argument: Argument, kind: Kind) -> Register:
        """A value as a register of a kind."""
        found = self._as(argument, kind)
        if isinstance(found, Register):
            return found
        return self.emit("add", found, 0.0) if kind == "f" else self.emit("add_int", found, 0)

    def finish(self, result: Register) -> tuple[list[int], list[float]]:
        """The code of a program that stores `result` to its only output, tensor 0, and its constants.

        Raises RegistersExhaustedError.
        """
        needed = self._needed(result)
        last_use = {result.number: len(self._instructions)}
        for number in reversed(needed):
            for argument in self._arguments(number):
                last_use.setdefault(argument, number)
        free = list(range(MOST_REGISTERS - 1, -1, -1))
        place: dict[int, int] = {}
        code: list[int] = []
        for number in needed:
            name, arguments = self._instructions[number]
            encoded = list(arguments) if name == LOAD else [self._encode(argument, place) for argument in arguments]
            if not free:
                raise RegistersExhaustedError
            place[number] = free.pop()
            free += sorted((place[a] for a in self._arguments(number) if last_use[a] == number), reverse=True)
            code += [INSTRUCTIONS[name].code, place[number], *encoded, *[0] * (3 - len(encoded))]
        code += [INSTRUCTIONS[STORE].code, 0, place[result.number], 0, 0]
        return code, list(self._constants)

    def _as(self, argument: Argument, kind: Kind) -> Argument:
        if not isinstance(argument, Register) or argument.kind == kind:
            return argument
        return self.emit("to_float" if kind == "f" else "to_int", argument)

    def _append(self, name: str, arguments: tuple[Argument, ...], kind: Kind) -> Register:
        key = (name, tuple((type(a), repr(a)) for a in arguments))
        if key not in self._known:
            self._instructions.append((name, arguments))
            self._known[key] = Register(len(self._instructions) - 1, kind)
        return self._known[key]

    def _needed(self, result: Register) -> list[int]:
        """The instructions that the result depends on, in order."""
        needed, open_ = set(), [result.number]
        while open_:
            number = open_.pop()
            if number not in needed:
                needed.add(number)
                open_ += self._arguments(number)
        return sorted(needed)

    def _arguments(self, number: int) -> list[int]:
        return list({a.number: None for a in self._instructions[number][1] if isinstance(a, Register)})

    def _encode(self, argument: Argument, place: dict[int, int]) -> int:
        if isinstance(argument, Register):
            return place[argument.number]
        return -1 - self._constants.setdefault(float(argument), len(self._constants))
