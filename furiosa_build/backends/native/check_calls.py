"""What has to hold of the operands of each operator: that shapes and dtypes are what the kernel takes them to be.

A check returns the operands that the call writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from furiosa_build.backends.native.check_attention import ATTENTION_CHECKS
from furiosa_build.backends.native.check_operands import (
    FLOATS,
    Operands,
    operand,
    present,
    require,
    require_computed,
    require_dense_last,
    require_floating,
    require_given,
    require_integer,
    require_numbers,
    require_packed,
    require_same_shape,
    require_shape,
)
from furiosa_build.backends.native.packing import ROWS
from furiosa_build.backends.native.plan import Call, View
from furiosa_build.backends.native.pointwise import INSTRUCTIONS, LOAD, MOST_REGISTERS, MOST_TENSORS, STORE

_FORMATS = {0: "float32", 1: "bfloat16", 2: "float16", 3: "uint8", 4: "uint8"}


def _pointwise(operands: Operands, call: Call) -> list[View]:
    views = [view for view in operands if view is not None]
    require(0 < len(views) == len(operands) <= MOST_TENSORS, "operands are missing, or too many")
    require_same_shape(*views)
    count, code = call.ints[0] if call.ints else 0, call.ints[1:]
    require(1 <= count <= len(views) and len(code) % 5 == 0, "its outputs or instructions are incomplete")
    names = {instruction.code: name for name, instruction in INSTRUCTIONS.items()}
    known: set[int] = set()
    for at in range(0, len(code), 5):
        number, d, *arguments = code[at : at + 5]
        require(number in names, f"there is no instruction {number}")
        name = names[number]
        if name == LOAD:
            require(count <= arguments[0] < len(views), "it loads what is not an input")
        limit = count if name == STORE else MOST_REGISTERS
        require(0 <= d < limit, "it writes to a register or tensor that is not there")
        used = arguments[: 1 if name == STORE else 0 if name == LOAD else len(INSTRUCTIONS[name].arguments)]
        require(all(-len(call.floats) <= a < 0 or a in known for a in used), "it reads what is not there")
        if name != STORE:
            known.add(d)
    return views[:count]


def _copy(operands: Operands, call: Call) -> list[View]:
    require_given(operands, "..")
    require_numbers(call, 0)
    require_same_shape(*operands)
    return operand(operands, 1)


def _reduce(operands: Operands, call: Call) -> list[View]:
    require_given(operands, "..")
    require_numbers(call, 2)
    [x, out], (kind, count) = present(operands), call.ints
    require(0 <= kind <= 4 and 0 <= count <= len(x.shape), "its kind or dimensions are not there")
    require_shape(out, *x.shape[: len(x.shape) - count])
    require(kind != 4 or out.dtype == "int64", "places are not int64")
    require(kind == 4 or (x.dtype in FLOATS) == (out.dtype in FLOATS), "numbers of one kind become the other")
    return [out]


def _softmax(operands: Operands, call: Call) -> list[View]:
    require_given(operands, "..")
    require_numbers(call, 1)
    require_same_shape(*operands)
    require_floating(*operands)
    require(bool(present(operands)[0].shape), "it has no dimension")
    return operand(operands, 1)


def _embedding(operands: Operands, call: Call) -> list[View]:
    require_given(operands, "...")
    require_numbers(call, 0)
    weight, ids, out = present(operands)
    require_integer(ids)
    require(bool(out.shape), "its output has no dimension")
    if weight.dtype == out.dtype == "uint8":
        require(out.stride[-1] == 1, "a row of its output is not contiguous")
    else:
        require_floating(weight, out)
    require_shape(out, *ids.shape, out.shape[-1])
    if len(weight.shape) == 2:
        require_shape(weight, weight.shape[0], out.shape[-1])
    else:
        require_packed(weight, weight.shape[0] * ROWS if weight.shape else 0, out.shape[-1])
    return [out]


def _norm(operands: Operands, call: Call) -> list[View]:
    require_given(operands, ".???.?")
    require_numbers(call, 2, 2)
    x, residual, weight, bias, out, total = operands
    assert x is not None
    assert out is not None
    require_floating(*operands)
    require_dense_last(*operands)
    require_same_shape(x, residual, out, total)
    require((residual is None) == (total is None), "a residual and the sum go together")
    for vector in (weight, bias):
        require_shape(vector, x.shape[-1])
    require(call.ints[0] in (0, 1) and call.ints[1] in (0, 1), "its kind is not there")
    return [view for view in (out, total) if view is not None]


def _rotary(operands: Operands, call: Call) -> list[View]:
    require_given(operands, "....")
    require_numbers(call, 1)
    x, cos, sin, out = present(operands)
    require_floating(*operands)
    require_dense_last(*operands)
    require_same_shape(x, out)
    require_same_shape(cos, sin)
    require_shape(cos, *x.shape[:-1], cos.shape[-1])
    require(cos.shape[-1] <= x.shape[-1] and cos.shape[-1] % 2 == 0, "the tables are too wide, or odd")
    require(call.ints[0] in (0, 1), "its kind is not there")
    return [out]


def _linear(operands: Operands, call: Call) -> list[View]:
    x, others = _products(operands, call, ".???.")
    written = []
    for format_, (weight, scale, bias, residual, out) in zip(call.ints, others, strict=True):
        assert weight is not None
        assert out is not None
        require(weight.dtype == _FORMATS.get(format_), "a weight is not of its format")
        require(x.dtype in FLOATS or (x.dtype == "int8" and format_ == 3), "x is not floating-point")
        _of_product(x, bias, residual, out)
        require_floating(scale)
        require_dense_last(scale)
        require_packed(weight, out.shape[1], x.shape[1])
        require(scale is None or scale.shape in ([1], [out.shape[1]]), "a scale is not for each output")
        written.append(out)
    return written


def _linear_groups(operands: Operands, call: Call) -> list[View]:
    x, others = _products(operands, call, "..???.")
    require(x.dtype in FLOATS or x.dtype == "int8", "x is not floating-point")
    written, columns = [], x.shape[1]
    for size, (weight, scale, zero, bias, residual, out) in zip(call.ints, others, strict=True):
        assert weight is not None
        assert scale is not None
        assert out is not None
        require(size in (32, 64, 128) and columns > 0 and columns % size == 0, "its columns are not whole groups")
        _of_product(x, bias, residual, out)
        rows, groups = out.shape[1], columns // size
        require(weight.dtype == "uint8", "a weight is not of 4 bits")
        require_packed(weight, rows, columns // 2)
        require_floating(scale)
        require(scale.dtype != "float64", "scales are float64")
        if groups == 1:
            require_shape(scale, rows)
            require_dense_last(scale)
        else:
            require_packed(scale, rows, groups)
        if zero is not None:
            require(zero.dtype == "uint8" and rows % 8 == 0, "zero points are not of eight rows each")
            require_packed(zero, rows // 8, 4 * groups)
        written.append(out)
    return written


def _products(operands: Operands, call: Call, of_each: str) -> tuple[View, list[list[View | None]]]:
    """The x of a call of products, and the other operands of each."""
    count = len(call.ints)
    require(count > 0 and not call.floats, "it has no weight")
    require_given(operands, ".?" + of_each * count)
    x, x_scale, *others = operands
    assert x is not None
    require(len(x.shape) == 2, "x is not a matrix")
    require_dense_last(x)
    require_shape(x_scale, x.shape[0])
    require(x_scale is None or x_scale.dtype == "float32", "the scales of x are not float32")
    require(x.dtype != "float64", "x is float64")
    require(x.dtype != "int8" or x_scale is not None, "rounded rows have no scales")
    size = len(of_each)
    return x, [list(others[size * number : size * number + size]) for number in range(count)]


def _of_product(x: View, bias: View | None, residual: View | None, out: View) -> None:
    """What all products of x have."""
    require_floating(bias, residual, out)
    require_dense_last(bias, residual, out)
    require(len(out.shape) == 2, "an output is not a matrix")
    require_shape(out, x.shape[0], out.shape[1])
    require_shape(bias, out.shape[1])
    require_shape(residual, x.shape[0], out.shape[1])


def _round_rows(operands: Operands, call: Call) -> list[View]:
    require_given(operands, ".?..")
    require_numbers(call, 1)
    x, largest, rows, scales = operands
    assert x is not None
    assert rows is not None
    assert scales is not None
    require(len(x.shape) == 2 and call.ints[0] in (3, 4), "x is not a matrix, or its format is not there")
    require_floating(x, largest)
    require_dense_last(x, rows)
    require_same_shape(x, rows)
    require_shape(scales, x.shape[0])
    require_shape(largest, x.shape[0])
    require_dense_last(scales, largest)
    require(rows.dtype == ("int8" if call.ints[0] == 3 else "bfloat16"), "the rows are not of the format")
    require(scales.dtype == "float32", "the scales are not float32")
    return [rows, scales]


def _unpack(operands: Operands, call: Call) -> list[View]:
    require_given(operands, "..")
    require_numbers(call, 0)
    packed, out = present(operands)
    require(len(out.shape) == 2 and out.dtype == packed.dtype, "the output is not the weight's matrix")
    require_packed(packed, *out.shape)
    return [out]


def _gather(operands: Operands, call: Call) -> list[View]:
    require_given(operands, "...")
    require_numbers(call, 2)
    x, index, out = present(operands)
    kind, dim = call.ints
    require_integer(index)
    require(kind in (0, 1) and 0 <= dim < len(x.shape), "its kind or dimension is not there")
    if kind == 0:
        require_shape(out, *x.shape[:dim], *index.shape, *x.shape[dim + 1 :])
    else:
        require_same_shape(index, out)
        require(len(index.shape) == len(x.shape), "the index has another number of dimensions")
        fits = all(own <= size or d == dim for d, (own, size) in enumerate(zip(index.shape, x.shape, strict=True)))
        require(fits, "the index is larger than x")
    require(x.dtype == out.dtype, "dtypes differ")
    return [out]


def _topk(operands: Operands, call: Call) -> list[View]:
    require_given(operands, "...")
    require_numbers(call, 0)
    x, values, places = present(operands)
    require_computed(x, values)
    require_integer(places)
    require(bool(x.shape) and len(values.shape) == len(x.shape), "values have not as many dimensions as x")
    require_shape(values, *x.shape[:-1], values.shape[-1])
    require_same_shape(values, places)
    require(values.shape[-1] <= x.shape[-1], "a row has not as many numbers")
    return [values, places]


def _scatter(operands: Operands, call: Call) -> list[View]:
    require_given(operands, "...")
    require_numbers(call, 0, 1)
    x, index, out = present(operands)
    require_computed(x, out)
    require_integer(index)
    require_same_shape(x, out)
    require(bool(x.shape) and len(index.shape) == len(x.shape), "the index has not as many dimensions as x")
    require_shape(index, *x.shape[:-1], index.shape[-1])
    return [out]


def _matmul(operands: Operands, call: Call) -> list[View]:
    require_given(operands, "...")
    require_numbers(call, 0)
    a, b, out = present(operands)
    require_floating(a, b, out)
    require(len(a.shape) == len(b.shape) >= 2 and a.shape[-1] == b.shape[-2], "a and b do not fit")
    require(a.shape[:-2] == b.shape[:-2], "leading dimensions differ")
    require_shape(out, *a.shape[:-1], b.shape[-1])
    return [out]


CHECKS: Mapping[str, Callable[[Operands, Call], list[View]]] = {
    "pointwise": _pointwise,
    "copy": _copy,
    "reduce": _reduce,
    "softmax": _softmax,
    "embedding": _embedding,
    "norm": _norm,
    "rotary": _rotary,
    "linear": _linear,
    "linear_groups": _linear_groups,
    "round_rows": _round_rows,
    "unpack": _unpack,
    "gather": _gather,
    "topk": _topk,
    "scatter": _scatter,
    "matmul": _matmul,
    **ATTENTION_CHECKS,
}
"""The check of each operator."""
