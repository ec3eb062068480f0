"""Every instruction of the pointwise machine against torch, elementary functions against float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from furiosa_build.backends.native.library import Library
from furiosa_build.backends.native.pointwise import INSTRUCTIONS, MOST_REGISTERS
from tests.test_backends.test_native.calls import Call, run

_KINDS = {"f": torch.float32, "i": torch.int64}
_FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -2.5, 3.5, 1e-30, -1e30, math.inf, -math.inf, math.nan, 7.0, -3.0]
_INTS = [0, 1, -1, 2, -2, 3, -7, 7, 63, 2**31, -(2**31), 2**62, -(2**63), 2**63 - 1]


def _code(
    *instructions: tuple[str, int, int, int, int] | tuple[str, int, int, int] | tuple[str, int, int],
) -> list[int]:
    numbers: list[int] = []
    for name, *rest in instructions:
        numbers += [INSTRUCTIONS[name].code, *rest, *[0] * (4 - len(rest))]
    return numbers


def _compute(library: Library, name: str, *arguments: Tensor) -> Tensor:
    """One instruction on its own."""
    instruction = INSTRUCTIONS[name]
    out = torch.empty(arguments[0].shape, dtype=_KINDS[instruction.result])
    loads = [("load", index, 1 + index) for index in range(len(arguments))]
    code = _code(*loads, (name, 5, *range(len(arguments))), ("store", 0, 5))
    run(library, Call("pointwise", [out, *arguments], [1, *code]))
    return out


def _pairs(values: list[float] | list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    row = torch.tensor(values, dtype=dtype)
    return row.repeat(len(values)), row.repeat_interleave(len(values))


# Functions that are computed exactly, or rounded once.
_EXACT: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "reciprocal": torch.reciprocal,
    "sqrt": torch.sqrt,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "sign": torch.sign,
    "round_bf16": lambda x: x.bfloat16().float(),
    "round_f16": lambda x: x.half().float(),
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "pow": torch.pow,
    "fmod": torch.fmod,
    "remainder": torch.remainder,
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "to_bool": lambda x: x.bool(),
    "to_int": lambda x: x.long(),
    "to_float": lambda x: x.float(),
    "neg_int": torch.neg,
    "abs_int": torch.abs,
    "not_int": torch.bitwise_not,
    "sign_int": torch.sign,
    "int_to_bool": lambda x: x.bool(),
    "to_int32": lambda x: x.int(),
    "to_int16": lambda x: x.short(),
    "to_int8": lambda x: x.to(torch.int8),
    "to_uint8": lambda x: x.to(torch.uint8),
    "add_int": torch.add,
    "sub_int": torch.sub,
    "mul_int": torch.mul,
    "floor_divide_int": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "truncate_divide_int": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "remainder_int": torch.remainder,
    "fmod_int": torch.fmod,
    "maximum_int": torch.maximum,
    "minimum_int": torch.minimum,
    "and_int": torch.bitwise_and,
    "or_int": torch.bitwise_or,
    "xor_int": torch.bitwise_xor,
    "shift_left_int": torch.bitwise_left_shift,
    "shift_right_int": torch.bitwise_right_shift,
    "eq_int": torch.eq,
    "ne_int": torch.ne,
    "lt_int": torch.lt,
    "le_int": torch.le,
    "gt_int": torch.gt,
    "ge_int": torch.ge,
}
_DIVISIONS = ("floor_divide_int", "truncate_divide_int", "remainder_int", "fmod_int")


@pytest.mark.parametrize("name", _EXACT)
def test_exact_instructions(each_width: Library, name: str) -> None:
    instruction = INSTRUCTIONS[name]
    floats = instruction.arguments[0] == "f"
    arguments = _pairs(_FLOATS, torch.float32) if floats else _pairs(_INTS, torch.int64)
    if name in ("fmod", "remainder"):  # torch's own is NaN where the quotient is beyond 2^128
        arguments = tuple(x[arguments[1].abs() != 1e-30] for x in arguments)
    if name == "to_int":
        arguments = (arguments[0].clamp(-1e15, 1e15).nan_to_num(0.0), arguments[1])
    if name in _DIVISIONS:  # torch refuses to divide by 0, and the machine traps at the smallest by -1
        fine = (arguments[1] != 0) & (arguments[1] != -1)
        arguments = (arguments[0][fine], arguments[1][fine])
    arguments = arguments[: len(instruction.arguments)]
    found = _compute(each_width, name, *arguments)
    wanted = _EXACT[name](*arguments)
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=3e-7 if name == "pow" else 0, atol=0, equal_nan=True)


def test_integers_are_never_divided_by_zero(library: Library) -> None:
    x = torch.tensor([5, -(2**63), 0, -5])
    for name in _DIVISIONS:
        assert not _compute(library, name, x, torch.zeros_like(x)).any()
    by_minus_1 = _compute(library, "truncate_divide_int", x, torch.full_like(x, -1))
    assert by_minus_1.tolist() == [-5, -(2**63), 0, 5]


_FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "rsqrt": (torch.rsqrt, 1e-30, 1e30),
    "exp": (torch.exp, -110, 92),
    "exp2": (torch.exp2, -155, 130),
    "expm1": (torch.expm1, -20, 92),
    "log": (torch.log, 0, 1e4),
    "log2": (torch.log2, 0, 1e4),
    "log1p": (torch.log1p, -1, 1e4),
    "sigmoid": (torch.sigmoid, -80, 80),
    "tanh": (torch.tanh, -12, 12),
    "erf": (torch.erf, -5, 5),
    "cos": (torch.cos, -3e5, 3e5),
    "sin": (torch.sin, -3e5, 3e5),
}


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_elementary_functions_are_within_3_units_of_the_last_place(each_width: Library, name: str) -> None:
    function, low, high = _FUNCTIONS[name]
    x = torch.cat(
        [
            torch.linspace(low, high, 40_000, dtype=torch.float64),
            torch.linspace(max(low, -3), min(high, 3), 40_000, dtype=torch.float64),
            torch.logspace(-40, math.log10(high), 10_000, dtype=torch.float64),
            -torch.logspace(-40, math.log10(-low), 10_000, dtype=torch.float64) if low < 0 else torch.ones(1),
            torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, -1.0]),
        ]
    ).float()
    found, wanted = _compute(each_width, name, x).double(), function(x.double())
    rounded = wanted.float().double()
    assert torch.equal(found.isnan(), rounded.isnan())
    special = ~rounded.isfinite()
    assert torch.equal(found[special].nan_to_num(1.0), rounded[special].nan_to_num(1.0))
    found, wanted = found[~special], wanted[~special]
    last_place = torch.ldexp(torch.ones_like(wanted), (wanted.abs().frexp().exponent - 24).clamp(min=-149))
    error = (found - wanted).abs() / last_place
    assert error.max() <= 3, (x[~special][error.argmax()].item(), error.max().item())


def test_large_exponents_of_two_are_exact(library: Library) -> None:
    powers = torch.ldexp(torch.ones(276), torch.arange(-148, 128))
    assert _compute(library, "log2", powers).tolist() == list(range(-148, 128))
    assert torch.equal(_compute(library, "exp2", torch.arange(-148.0, 128.0)), powers)


@pytest.mark.parametrize("kind", ["f", "i"])
def test_where(each_width: Library, kind: str) -> None:
    condition = torch.randint(0, 2, (1000,))
    x, y = (torch.randint(-9, 9, (1000,)).to(_KINDS[kind]) for _ in range(2))
    name = "where" if kind == "f" else "where_int"
    assert torch.equal(_compute(each_width, name, condition, x, y), torch.where(condition != 0, x, y))


def test_a_chain_keeps_float32_between_its_instructions(each_width: Library) -> None:
    gate, up = (torch.randn(3, 5000, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(2))
    out, scaled = torch.empty_like(gate), torch.empty(3, 5000)
    code = _code(
        ("load", 0, 2), ("load", 1, 3), ("sigmoid", 2, 0), ("mul", 0, 0, 2), ("mul", 0, 0, 1), ("store", 0, 0),
        ("mul", 0, 0, -1), ("store", 1, 0),
    )  # fmt: skip
    run(each_width, Call("pointwise", [out, scaled, gate, up], [2, *code], [0.1]))
    wanted = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(scaled.double(), wanted * 0.1, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(out.double(), wanted, rtol=2**-8, atol=0)


def test_constants(library: Library) -> None:
    x, out = torch.arange(10), torch.empty(10, dtype=torch.int64)
    constants = [2.0, 2.0**63, -math.inf]
    code = _code(
        ("load", 0, 1), ("mul_int", 0, 0, -1), ("minimum_int", 0, 0, -2), ("maximum_int", 0, -3, 0), ("store", 0, 0)
    )
    run(library, Call("pointwise", [out, x], [1, *code], constants))
    assert torch.equal(out, x * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_operands_are_repeated_and_strided(each_width: Library, dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 5, 33).to(dtype).permute(0, 2, 1, 3)
    row, column, number = torch.randn(33), torch.randn(7, 1).half(), torch.randn(())
    whole = torch.zeros(2, 5, 7, 40, dtype=dtype)
    out = whole[..., 3:36]
    operands = [tensor.expand(2, 5, 7, 33) for tensor in (row, column, number)]
    code = _code(
        ("load", 0, 1), ("load", 1, 2), ("add", 0, 0, 1), ("load", 1, 3), ("mul", 0, 0, 1), ("load", 1, 4),
        ("sub", 0, 0, 1), ("store", 0, 0),
    )  # fmt: skip
    run(each_width, Call("pointwise", [out, x, *operands], [1, *code]))
    assert torch.equal(out, ((x.float() + row) * column.float() - number).to(dtype))
    assert not whole[..., :3].any()
    assert not whole[..., 36:].any()


def test_in_place(library: Library) -> None:
    x = torch.randn(20_000)
    wanted = x * x
    run(library, Call("pointwise", [x, x], [1, *_code(("load", 0, 1), ("mul", 0, 0, 0), ("store", 0, 0))]))
    assert torch.equal(x, wanted)


def test_every_register(library: Library) -> None:
    x, out = torch.ones(300), torch.empty(300)
    loads = [("load", register, 1) for register in range(MOST_REGISTERS)]
    sums = [("add", 0, 0, register) for register in range(1, MOST_REGISTERS)]
    run(library, Call("pointwise", [out, x], [1, *_code(*loads, *sums, ("store", 0, 0))]))
    assert torch.equal(out, torch.full((300,), float(MOST_REGISTERS)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool], ids=str)
def test_integers_are_int64_between_loading_and_storing(library: Library, dtype: torch.dtype) -> None:
    x, out = torch.randint(0, 100, (700,)).to(dtype), torch.empty(700, dtype=torch.bool)
    code = _code(("load", 0, 1), ("mul_int", 0, 0, -1), ("gt_int", 0, 0, -2), ("store", 0, 0))
    run(library, Call("pointwise", [out, x], [1, *code], [1000.0, 50_000.0]))
    assert torch.equal(out, x.long() * 1000 > 50_000)
    narrow = torch.empty(700, dtype=dtype)
    code = _code(("load", 0, 1), ("add_int", 0, 0, -1), ("store", 0, 0))
    run(library, Call("pointwise", [narrow, x], [1, *code], [100.0]))
    assert torch.equal(narrow, (x.long() + 100).to(dtype))
