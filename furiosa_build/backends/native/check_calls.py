"""What has to hold of the operands of each operator: that shapes and dtypes are what the kernel takes them to be.

A check returns the operands that the call writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from furiosa_build.backends.native.packing import ROWS
from furiosa_build.backends.native.plan import Call, View
from furiosa_build.backends.native.pointwise import INSTRUCTIONS, LOAD, MOST_REGISTERS, MOST_TENSORS, STORE

Operands = Sequence[View | None]
_FLOATS = {"float32", "bfloat16", "float16", "float64"}
_PLACE = {"float32": 1, "bfloat16": 2, "float16": 2, "uint8": 4}
"""Numbers of a row that lie together in a packed weight."""
_FORMATS = {0: "float32", 1: "bfloat16", 2: "float16", 3: "uint8", 4: "uint8"}


class Problem(Exception):  # noqa: N818 (it becomes a ValueError with the call's number)
    """What is wrong with a call."""


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Problem(otherwise)


def _given(operands: Operands, optional: str) -> None:
    """`optional` has a `?` for each operand that may be left out, `.` for one that may not."""
    _require(len(operands) == len(optional), f"it has {len(operands)} operands, not {len(optional)}")
    missing = [n for n, (view, mark) in enumerate(zip(operands, optional, strict=True)) if view is None and mark == "."]
    _require(not missing, f"operand {missing[0] if missing else 0} is missing")


def _numbers(call: Call, ints: int, floats: int = 0) -> None:
    _require((len(call.ints), len(call.floats)) == (ints, floats), "it has other ints or floats")


def _floating(*views: View | None) -> None:
    _require(all(view is None or view.dtype in _FLOATS for view in views), "an operand is not floating-point")


def _computed(*views: View | None) -> None:
    dtypes = ("float32", "bfloat16", "float16")
    _require(all(view is None or view.dtype in dtypes for view in views), "an operand is not of a dtype to compute in")


def _integer(*views: View | None) -> None:
    _require(all(view is None or view.dtype == "int64" for view in views), "an index is not int64")


def _same_shape(*views: View | None) -> None:
    shapes = [view.shape for view in views if view is not None]
    _require(all(shape == shapes[0] for shape in shapes), "shapes differ")


def _shape(view: View | None, *shape: int) -> None:
    _require(view is None or view.shape == list(shape), f"an operand is not of shape {list(shape)}")


def _dense_last(*views: View | None) -> None:
    for view in views:
        if view is not None:
            _require(bool(view.shape), "an operand has no dimension")
            _require(view.stride[-1] == 1 or view.shape[-1] <= 1, "the last dimension is not contiguous")


def _pointwise(operands: Operands, call: Call) -> list[View]:
    views = [view for view in operands if view is not None]
    _require(0 < len(views) == len(operands) <= MOST_TENSORS, "operands are missing, or too many")
    _same_shape(*views)
    count, code = call.ints[0] if call.ints else 0, call.ints[1:]
    _require(1 <= count <= len(views) and len(code) % 5 == 0, "its outputs or instructions are incomplete")
    names = {instruction.code: name for name, instruction in INSTRUCTIONS.items()}
    known: set[int] = set()
    for at in range(0, len(code), 5):
        number, d, *arguments = code[at : at + 5]
        _require(number in names, f"there is no instruction {number}")
        name = names[number]
        if name == LOAD:
            _require(count <= arguments[0] < len(views), "it loads what is not an input")
        limit = count if name == STORE else MOST_REGISTERS
        _require(0 <= d < limit, "it writes to a register or tensor that is not there")
        used = arguments[: 1 if name == STORE else 0 if name == LOAD else len(INSTRUCTIONS[name].arguments)]
        _require(all(-len(call.floats) <= a < 0 or a in known for a in used), "it reads what is not there")
        if name != STORE:
            known.add(d)
    return views[:count]


def _copy(operands: Operands, call: Call) -> list[View]:
    _given(operands, "..")
    _numbers(call, 0)
    _same_shape(*operands)
    return _written(operands, 1)


def _reduce(operands: Operands, call: Call) -> list[View]:
    _given(operands, "..")
    _numbers(call, 2)
    [x, out], (kind, count) = _all(operands), call.ints
    _require(0 <= kind <= 4 and 0 <= count <= len(x.shape), "its kind or dimensions are not there")
    _shape(out, *x.shape[: len(x.shape) - count])
    _require(kind != 4 or out.dtype == "int64", "places are not int64")
    _require(kind == 4 or (x.dtype in _FLOATS) == (out.dtype in _FLOATS), "numbers of one kind become the other")
    return [out]


def _softmax(operands: Operands, call: Call) -> list[View]:
    _given(operands, "..")
    _numbers(call, 1)
    _same_shape(*operands)
    _floating(*operands)
    _require(bool(_all(operands)[0].shape), "it has no dimension")
    return _written(operands, 1)


def _embedding(operands: Operands, call: Call) -> list[View]:
    _given(operands, "...")
    _numbers(call, 0)
    weight, ids, out = _all(operands)
    _integer(ids)
    _floating(weight, out)
    _require(bool(out.shape), "its output has no dimension")
    _shape(out, *ids.shape, out.shape[-1])
    if len(weight.shape) == 2:
        _shape(weight, weight.shape[0], out.shape[-1])
    else:
        _packed(weight, weight.shape[0] * ROWS if weight.shape else 0, out.shape[-1])
    return [out]


def _norm(operands: Operands, call: Call) -> list[View]:
    _given(operands, ".???.?")
    _numbers(call, 2, 2)
    x, residual, weight, bias, out, total = operands
    assert x is not None
    assert out is not None
    _floating(*operands)
    _dense_last(*operands)
    _same_shape(x, residual, out, total)
    _require((residual is None) == (total is None), "a residual and the sum go together")
    for vector in (weight, bias):
        _shape(vector, x.shape[-1])
    _require(call.ints[0] in (0, 1) and call.ints[1] in (0, 1), "its kind is not there")
    return [view for view in (out, total) if view is not None]


def _rotary(operands: Operands, call: Call) -> list[View]:
    _given(operands, "....")
    _numbers(call, 1)
    x, cos, sin, out = _all(operands)
    _floating(*operands)
    _dense_last(*operands)
    _same_shape(x, out)
    _same_shape(cos, sin)
    _shape(cos, *x.shape[:-1], cos.shape[-1])
    _require(cos.shape[-1] <= x.shape[-1] and cos.shape[-1] % 2 == 0, "the tables are too wide, or odd")
    _require(call.ints[0] in (0, 1), "its kind is not there")
    return [out]


def _linear(operands: Operands, call: Call) -> list[View]:
    count = len(call.ints)
    _require(count > 0 and not call.floats, "it has no weight")
    _given(operands, ".?" + ".???." * count)
    x, x_scale, *others = operands
    assert x is not None
    _require(len(x.shape) == 2, "x is not a matrix")
    _dense_last(x)
    rows, columns = x.shape
    _shape(x_scale, rows)
    _require(x_scale is None or x_scale.dtype == "float32", "the scales of x are not float32")
    written = []
    for number, format_ in enumerate(call.ints):
        weight, scale, bias, residual, out = others[5 * number : 5 * number + 5]
        assert weight is not None
        assert out is not None
        _require(weight.dtype == _FORMATS.get(format_), "a weight is not of its format")
        _require(x.dtype in _FLOATS or (x.dtype == "int8" and format_ == 3), "x is not floating-point")
        _require(x.dtype != "float64", "x is float64")
        _require(x.dtype != "int8" or x_scale is not None, "rounded rows have no scales")
        _floating(scale, bias, residual, out)
        _dense_last(scale, bias, residual, out)
        _require(len(out.shape) == 2, "an output is not a matrix")
        _shape(out, rows, out.shape[1])
        _packed(weight, out.shape[1], columns)
        _require(scale is None or scale.shape in ([1], [out.shape[1]]), "a scale is not for each output")
        _shape(bias, out.shape[1])
        _shape(residual, rows, out.shape[1])
        written.append(out)
    return written


def _round_rows(operands: Operands, call: Call) -> list[View]:
    _given(operands, ".?..")
    _numbers(call, 1)
    x, largest, rows, scales = operands
    assert x is not None
    assert rows is not None
    assert scales is not None
    _require(len(x.shape) == 2 and call.ints[0] in (3, 4), "x is not a matrix, or its format is not there")
    _floating(x, largest)
    _dense_last(x, rows)
    _same_shape(x, rows)
    _shape(scales, x.shape[0])
    _shape(largest, x.shape[0])
    _dense_last(scales, largest)
    _require(rows.dtype == ("int8" if call.ints[0] == 3 else "bfloat16"), "the rows are not of the format")
    _require(scales.dtype == "float32", "the scales are not float32")
    return [rows, scales]


def _unpack(operands: Operands, call: Call) -> list[View]:
    _given(operands, "..")
    _numbers(call, 0)
    packed, out = _all(operands)
    _require(len(out.shape) == 2 and out.dtype == packed.dtype, "the output is not the weight's matrix")
    _packed(packed, *out.shape)
    return [out]


def _gather(operands: Operands, call: Call) -> list[View]:
    _given(operands, "...")
    _numbers(call, 2)
    x, index, out = _all(operands)
    kind, dim = call.ints
    _integer(index)
    _require(kind in (0, 1) and 0 <= dim < len(x.shape), "its kind or dimension is not there")
    if kind == 0:
        _shape(out, *x.shape[:dim], *index.shape, *x.shape[dim + 1 :])
    else:
        _same_shape(index, out)
        _require(len(index.shape) == len(x.shape), "the index has another number of dimensions")
        fits = all(own <= size or d == dim for d, (own, size) in enumerate(zip(index.shape, x.shape, strict=True)))
        _require(fits, "the index is larger than x")
    _require(x.dtype == out.dtype, "dtypes differ")
    return [out]


def _topk(operands: Operands, call: Call) -> list[View]:
    _given(operands, "...")
    _numbers(call, 0)
    x, values, places = _all(operands)
    _computed(x, values)
    _integer(places)
    _require(bool(x.shape) and len(values.shape) == len(x.shape), "values have not as many dimensions as x")
    _shape(values, *x.shape[:-1], values.shape[-1])
    _same_shape(values, places)
    _require(values.shape[-1] <= x.shape[-1], "a row has not as many numbers")
    return [values, places]


def _scatter(operands: Operands, call: Call) -> list[View]:
    _given(operands, "...")
    _numbers(call, 0, 1)
    x, index, out = _all(operands)
    _computed(x, out)
    _integer(index)
    _same_shape(x, out)
    _require(bool(x.shape) and len(index.shape) == len(x.shape), "the index has not as many dimensions as x")
    _shape(index, *x.shape[:-1], index.shape[-1])
    return [out]


def _matmul(operands: Operands, call: Call) -> list[View]:
    _given(operands, "...")
    _numbers(call, 0)
    a, b, out = _all(operands)
    _floating(a, b, out)
    _require(len(a.shape) == len(b.shape) >= 2 and a.shape[-1] == b.shape[-2], "a and b do not fit")
    _require(a.shape[:-2] == b.shape[:-2], "leading dimensions differ")
    _shape(out, *a.shape[:-1], b.shape[-1])
    return [out]


def _write_kv_cache(operands: Operands, call: Call) -> list[View]:
    _given(operands, ".....")
    _numbers(call, 0)
    key, value, key_cache, value_cache, slots = _all(operands)
    _integer(slots)
    for new, cache in ((key, key_cache), (value, value_cache)):
        _require(len(new.shape) == 4 and len(cache.shape) == 3 and cache.shape[0] == 0, "a cache is not one")
        _require(new.shape[1] == cache.shape[1] and new.shape[3] == cache.shape[2], "a cache is of other heads")
        _require([new.shape[0], new.shape[2]] == slots.shape, "there is not a slot for each token")
        _computed(new)
        _require(new.dtype == cache.dtype, "a cache is of another dtype")
        _dense_last(new)
    return [key_cache, value_cache]


def _paged_attention(operands: Operands, call: Call) -> list[View]:
    _given(operands, ".??????????")
    _numbers(call, 2, 2)
    query, key, value, key_cache, value_cache, slots, lens, positions, sinks, out, partial = operands
    assert query is not None
    _computed(query, key, value, key_cache, value_cache, sinks, out)
    _integer(slots, lens, positions)
    _dense_last(query, key, value, sinks, out, partial, slots, lens, positions)
    _require(len(query.shape) == 4, "the query has not four dimensions")
    batch, heads, tokens, size = query.shape
    if slots is None:
        _require(key is not None and value is not None and key_cache is None and value_cache is None, "nothing is read")
        assert key is not None
        assert value is not None
        _require(len(key.shape) == 4 == len(value.shape), "keys have not four dimensions")
        _shape(key, batch, key.shape[1], tokens, size)
        _shape(value, batch, key.shape[1], tokens, value.shape[3])
        kv_heads, value_size = key.shape[1], value.shape[3]
    else:
        _require(key is None and value is None, "keys are given, and are in the cache")
        _require(key_cache is not None and value_cache is not None, "there is no cache")
        assert key_cache is not None
        assert value_cache is not None
        _require(len(key_cache.shape) == 3 == len(value_cache.shape), "a cache is not one")
        kv_heads, value_size = key_cache.shape[1], value_cache.shape[2]
        _shape(key_cache, 0, kv_heads, size)
        _shape(value_cache, 0, kv_heads, value_size)
        _require(len(slots.shape) == 2 and slots.shape[0] == batch, "there are not slots for each sequence")
        _require((lens if tokens == 1 else positions) is not None, "how far a token attends is not given")
    _shape(lens, batch)
    _shape(positions, batch, tokens)
    _shape(sinks, heads)
    _require(kv_heads > 0 and heads % kv_heads == 0, "heads do not share the KV heads evenly")
    window, chunk = call.ints
    _require(window >= 0, "the window is negative")
    _shape(out, batch, tokens, heads, value_size)
    if partial is not None and slots is not None:
        _require(out is None and sinks is None and chunk > 0 and chunk % 64 == 0, "its parts are no chunks")
        _shape(partial, batch, -(-slots.shape[1] // chunk), tokens, heads, value_size + 2)
        _require(partial.dtype == "float32", "its parts are not float32")
    else:
        _require(out is not None and partial is None, "it has no output")
    return [view for view in (out, partial) if view is not None]


def _join_attention(operands: Operands, call: Call) -> list[View]:
    _given(operands, ".?.")
    _numbers(call, 0)
    partial, sinks, out = operands
    assert partial is not None
    assert out is not None
    _computed(partial, sinks, out)
    _dense_last(partial, sinks, out)
    _require(len(partial.shape) == 5 and len(out.shape) == 4 and partial.dtype == "float32", "it has no parts")
    batch, chunks, tokens, heads, size = partial.shape
    _require(chunks > 0 and size > 2, "it has no parts")
    _shape(out, batch, tokens, heads, size - 2)
    _shape(sinks, heads)
    return [out]


def _packed(weight: View, rows: int, columns: int) -> None:
    """A weight [rows, columns], packed."""
    together = _PLACE.get(weight.dtype)
    _require(together is not None, "a weight is of a dtype that is not packed")
    assert together is not None
    head = [-(-rows // ROWS), -(-columns // together), ROWS]
    _shape(weight, *head, *([together] if together > 1 else []))
    step, dense = 1, []
    for size in reversed(weight.shape):
        dense.append(step)
        step *= size
    _require(weight.stride == dense[::-1], "a weight is not contiguous")


def _all(operands: Operands) -> list[View]:
    return [view for view in operands if view is not None]


def _written(operands: Operands, number: int) -> list[View]:
    return [_all(operands)[number]]


CHECKS: Mapping[str, Callable[[Operands, Call], list[View]]] = {
    "pointwise": _pointwise,
    "copy": _copy,
    "reduce": _reduce,
    "softmax": _softmax,
    "embedding": _embedding,
    "norm": _norm,
    "rotary": _rotary,
    "linear": _linear,
    "round_rows": _round_rows,
    "unpack": _unpack,
    "gather": _gather,
    "topk": _topk,
    "scatter": _scatter,
    "matmul": _matmul,
    "write_kv_cache": _write_kv_cache,
    "paged_attention": _paged_attention,
    "join_attention": _join_attention,
}
"""The check of each operator."""
