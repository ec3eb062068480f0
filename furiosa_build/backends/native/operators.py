"""The operators that the library runs: what a call of each takes. csrc/kernels.h has the same numbers.

Every operator computes in float32 (integers and bool in int64) and rounds to the dtype of the tensor that it writes.
Any operand may have any strides, unless its operator says otherwise; a written operand repeats no element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Operand(NamedTuple):
    """One of the tensors of a call: may it be left out, is it written, may there be several of it."""

    name: str
    optional: bool
    written: bool
    repeated: bool


@dataclass(frozen=True)
class Operator:
    """What a call of an operator takes.

    Attributes:
        number: Of the operator in a program.
        operands: Names in the order of the call's tensors. Behind a name, `?`: may be left out; `!`: is written;
            `*`: any number of them.
        ints: What the call's integers are, by name and in order.
        floats: What the call's floating-point numbers are.
        meaning: What it computes.
    """

    number: int
    operands: str
    meaning: str
    ints: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()

    def each_operand(self) -> Iterator[Operand]:
        """The operands in order."""
        for word in self.operands.split():
            yield Operand(word.rstrip("?!*"), "?" in word, "!" in word, "*" in word)


OPERATORS = {
    "pointwise": Operator(
        0,
        "outputs!* inputs*",
        "A program of pointwise.INSTRUCTIONS over every element. All tensors have one shape. The first of `ints` is how"
        " many of the tensors are outputs. An output may be the same view as an input that is not loaded after the"
        " store. `floats` are the program's constants.",
        ints=("num_outputs", "instructions"),
        floats=("constants",),
    ),
    "copy": Operator(1, "x out!", "out = x, of the same shape, converted as torch's `to` does."),
    "reduce": Operator(
        2,
        "x out!",
        "Over the last `num_dims` dimensions of x; out has the shape of the others. kind: 0 sum, 1 mean, 2 largest,"
        " 3 smallest, 4 the place of the largest (int64, counted in the order of the reduced dimensions). Sums of"
        " integers are int64.",
        ints=("kind", "num_dims"),
    ),
    "softmax": Operator(3, "x out!", "Softmax over the last dimension; logarithm 1: log_softmax.", ints=("logarithm",)),
    "embedding": Operator(
        4,
        "weight ids out!",
        "out[..., :] = row ids[...] of weight: [N, K], or packed (of rank 3 or 4, as `unpack` takes it). A row that the"
        " weight does not have is NaN; of uint8, which out is too then, 0.",
    ),
    "norm": Operator(
        5,
        "x residual? weight? bias? out! sum!?",
        "h = x + residual, rounded to the dtype of `sum` and stored there, if they are given; out = h normalized over"
        " the last dimension, times (weight + offset), plus bias (both [size]). kind 0: h / sqrt(mean(h^2) + eps); 1:"
        " (h - mean(h)) / sqrt(variance(h) + eps). rounds 1: the normalized h is rounded to the dtype of x before it is"
        " multiplied by the weight. The last dimension is contiguous in all tensors.",
        ints=("kind", "rounds"),
        floats=("eps", "offset"),
    ),
    "rotary": Operator(
        6,
        "x cos sin out!",
        "Rotary embedding over the last dimension. x and out: [..., D]; cos and sin: [..., R] of the same leading"
        " shape (expanded), R <= D even. kind 0: element i < R/2 goes with element i + R/2 (rotate_half); 1: elements"
        " 2i and 2i + 1 go together. Elements from R on are copied. out = x * cos + rotated(x) * sin. The last"
        " dimension is contiguous in all tensors.",
        ints=("kind",),
    ),
    "linear": Operator(
        7,
        "x x_scale? weight* scale?* bias?* residual?* out!*",
        "out = x @ weight.T * x_scale * scale + bias + residual. x [M, K]; x_scale [M] float32. Then, for each of"
        " `formats`, five tensors: weight, packed (packing.py) from [N, K]; scale [N] or [1]; bias [N]; residual and"
        " out [M, N]. formats: 0 float32, 1 bfloat16, 2 float16, 3 int8, 4 float8_e4m3fn (3 and 4 as uint8). x is"
        " float32, bfloat16 or float16; or, if all formats are 3, int8. scale, bias, residual and out are floating. The"
        " last dimension of all is contiguous.",
        ints=("formats",),
    ),
    "linear_groups": Operator(
        20,
        "x x_scale? weight* scale* zero?* bias?* residual?* out!*",
        "As `linear`, with weights of 4 bits whose columns are in groups: out = x @ (scale * (weight - zero)).T *"
        " x_scale + bias + residual. For each of `group_sizes` (32, 64 or 128, of which K is a multiple), six tensors."
        " weight: uint8, packed from [N, K / 2], a byte two numbers + 8, the first in the low bits. scale: packed from"
        " [N, K / group size], or [N] if that is one group; float32, bfloat16 or float16. zero: uint8, packed from"
        " [N / 8, 4 * K / group size], in 4 bytes a group's number + 8 of eight rows; not given: 0. x may be int8.",
        ints=("group_sizes",),
    ),
    "round_rows": Operator(
        8,
        "x largest? rows! scales!",
        "rows * scales = x [M, K], rounded to 8-bit numbers as schemes with dynamic activations do. largest [M], of the"
        " dtype of x: what each row's largest magnitude is taken to be; not given: what it is. format 3: rows are int8;"
        " 4: numbers of float8_e4m3fn, as bfloat16 (or another floating dtype). scales: [M] float32. The last dimension"
        " is contiguous in x and rows.",
        ints=("format",),
    ),
    "unpack": Operator(
        9,
        "packed out!",
        "out [N, K] = the numbers of a packed weight of the same dtype: [N/32 rounded up, K/P rounded up, 32, P] where"
        " P is 2 for 2-byte and 4 for 1-byte numbers, and [N/32 rounded up, K, 32] for 4-byte numbers.",
    ),
    "write_kv_cache": Operator(
        10,
        "key value key_cache! value_cache! slot_mapping",
        "key_cache[slot_mapping[b, t], h] = key[b, h, t], and so of the values: [batch, kv_heads, tokens, size], caches"
        " [slots, kv_heads, size], slot_mapping int64 [batch, tokens]. The dtype of key is that of key_cache, and so of"
        " the values. The last dimension is contiguous in key and value; caches are laid out as csrc/kv_cache.h has it:"
        " the size of keys is even where they have 16 bits. Or caches [slots, kv_heads, size + 4] have codes of 8 bits,"
        " int8, or uint8 for float8_e4m3fn: key and value are of any floating dtype then, and the size of keys is a"
        " multiple of 4.",
    ),
    "read_kv_cache": Operator(
        17,
        "cache slots out!",
        "out [batch, context, kv_heads, size] = cache[slots], as it was when the call began: for attention that a graph"
        " computes itself. The last dimension of out is contiguous. part 0: the cache is of keys, 1: of values.",
        ints=("part",),
    ),
    "paged_attention": Operator(
        11,
        "query key_cache value_cache context_slots context_lens? position_ids? sinks? out!? partial!?",
        "backends.ops.paged_attention without its writes, from the caches alone. query [batch, heads, tokens, size]. A"
        " token attends to the first context_lens, or to those up to its position, or, where neither is given, to those"
        " up to its own number; out [batch, tokens, heads, size of values]. Instead of out there may be partial,"
        " float32 [batch, chunks, tokens, heads, size of values + 2], of which `join_attention` makes it, and no sinks:"
        " chunk i is about positions from i * chunk_tokens on, a multiple of 64. sliding_window and softcap 0: there is"
        " none. All but indices are float32, bf16 or f16; the last dimension is contiguous in all of them.",
        ints=("sliding_window", "chunk_tokens"),
        floats=("scaling", "softcap"),
    ),
    "join_attention": Operator(
        14, "partial sinks? out!", "The output of paged_attention, of its parts: operands are those of paged_attention."
    ),
    "gather": Operator(
        12,
        "x index out!",
        "By int64 indices along dimension `dim` of x; negative ones count from the end, and where there is no such"
        " element out is NaN (integers: -1). kind 0: out has the shape of x with dimension `dim` replaced by the shape"
        " of index (index_select); 1: index has the shape of out (torch.gather).",
        ints=("kind", "dim"),
    ),
    "topk": Operator(
        15,
        "x values! places!",
        "The largest numbers of each row of x and their places (int64), the largest first, of equal ones the first."
        " NaN counts as the largest. values, places: [..., K] where x is [..., N], K <= N.",
    ),
    "scatter": Operator(
        16,
        "x index out!",
        "out = x, but for `value` at the places that each row of index [..., K] has in that of x [..., N]. Floating.",
        floats=("value",),
    ),
    "matmul": Operator(
        13, "a b out!", "out [..., M, N] = a [..., M, K] @ b [..., K, N]; leading dimensions are equal (expanded)."
    ),
}
"""Operators by name."""
