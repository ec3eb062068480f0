"""The instructions of operator `pointwise`: a small machine whose registers are tiles of numbers.

A register holds float32 numbers ("f") or int64 numbers ("i"; booleans are 0 and 1), whatever was put there last. An
instruction is five integers: code, d, a, b, c. `d` is the register that is written; a, b and c are registers, or
constants: -1 - n is number n of the call's floats, as float32 or as int64 (saturated), as the instruction needs it.
Arguments that an instruction does not have are 0.
"""

from __future__ import annotations

from dataclasses import dataclass

NUMBERS_OF_AN_INSTRUCTION = 5
MOST_REGISTERS = 48
MOST_TENSORS = 32


@dataclass(frozen=True)
class Instruction:
    """What an instruction computes.

    Attributes:
        code: Its number; csrc/pointwise.cpp has the same.
        result: "f" or "i"; of `load` and `store`, whose kind is that of the tensor's dtype, "".
        arguments: The kinds of a, b and c.
    """

    code: int
    result: str
    arguments: str


LOAD, STORE = "load", "store"
"""`load`: register d = tensor a, converted to float32 or int64. `store`: tensor d = a, rounded to its dtype.

Tensors are numbered as in the call. Floating dtypes are of kind "f", integers and bool of kind "i": storing to an
integer keeps the low bits, to a bool whether the number is not 0.
"""

_SIGNATURES = {
    ("", ""): f"{LOAD} {STORE}",
    ("f", "f"): "neg abs reciprocal rsqrt sqrt exp exp2 expm1 log log2 log1p sigmoid tanh erf floor ceil round trunc "
    "cos sin sign round_bf16 round_f16",  # both round to the format and stay float32
    ("f", "ff"): "add sub mul div maximum minimum pow fmod remainder",  # maximum and minimum: NaN if either is
    ("i", "ff"): "eq ne lt le gt ge",
    ("i", "f"): "isnan isinf to_int to_bool",  # to_int truncates, as torch's conversion to int64
    ("f", "i"): "to_float",
    ("f", "iff"): "where",
    ("i", "i"): "neg_int abs_int not_int sign_int int_to_bool to_int32 to_int16 to_int8 to_uint8",  # not_int: of bits
    ("i", "ii"): "add_int sub_int mul_int floor_divide_int truncate_divide_int remainder_int fmod_int maximum_int "
    "minimum_int and_int or_int xor_int shift_left_int shift_right_int eq_int ne_int lt_int le_int gt_int ge_int",
    ("i", "iii"): "where_int",
}


def _instructions() -> dict[str, Instruction]:
    found: dict[str, Instruction] = {}
    for (result, arguments), names in _SIGNATURES.items():
        for name in names.split():
            found[name] = Instruction(len(found), result, arguments)
    return found


INSTRUCTIONS = _instructions()
"""Instructions by name. A division of integers by 0 gives 0; `logical_not` of a bool is `eq_int` with 0."""
