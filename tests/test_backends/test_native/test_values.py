"""Views of values are those of torch; what is in use at the same time lies apart."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from furiosa_build.backends.native.memory import lay_out
from furiosa_build.backends.native.values import Buffer, Value


def seen(value: Value) -> list[int]:
    """The elements of a value whose buffer holds the numbers from 0 on, in order."""
    numbers = torch.arange(4096).as_strided(value.shape, value.stride, value.offset // 8)
    return numbers.flatten().tolist()  # type: ignore[no-any-return]


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(1, 4)] * 3),
    st.lists(st.sampled_from(["permute", "slice", "select", "split", "join", "expand"]), max_size=6),
    st.randoms(use_true_random=False),
)
def test_views_are_those_of_torch(shape: tuple[int, ...], steps: list[str], random: Any) -> None:
    value = Value.whole(Buffer("arena", 0), "int64", shape)
    tensor = torch.arange(value.numel).reshape(shape)
    for step in steps:
        rank = tensor.dim()
        if step == "permute":
            order = random.sample(range(rank), rank)
            value, tensor = value.permute(order), tensor.permute(order)
        elif step == "slice" and rank:
            dim, begin, stride = random.randrange(rank), random.randrange(3), random.choice([1, 2])
            end = begin + random.randrange(1, 4)
            if tensor.shape[dim] > begin:
                value = value.slice(dim, begin, end, stride)
                tensor = torch.ops.aten.slice(tensor, dim, begin, end, stride)
        elif step == "select" and rank:
            dim = random.randrange(rank)
            value, tensor = value.select(dim, -1), tensor.select(dim, -1)
        elif step == "expand" and 1 in tensor.shape:
            sizes = [3 if size == 1 else -1 for size in tensor.shape]
            value, tensor = value.expand(sizes), tensor.expand(sizes)
        else:
            wanted = [1, *tensor.shape, 1] if step == "split" else [-1]
            reshaped = value.reshape(wanted)
            if reshaped is not None:
                value = reshaped
                tensor = tensor.reshape(wanted)
        assert value.shape == tuple(tensor.shape)
        assert seen(value) == tensor.flatten().tolist()
        assert not value.is_contiguous or tensor.is_contiguous()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=12))
def test_buffers_in_use_at_the_same_time_lie_apart(drawn: list[tuple[int, int, int]]) -> None:
    """Each buffer: its size, its first call, and for how many calls it is used."""
    buffers = [Buffer("arena", -1, nbytes) for nbytes, _, _ in drawn]
    calls: list[tuple[str, list[Value | None]]] = [("copy", [None]) for _ in range(15)]
    for buffer, (nbytes, begin, length) in zip(buffers, drawn, strict=True):
        for number in (begin, begin + length):
            calls[number][1].append(Value.whole(buffer, "int8", (nbytes,)))
    arena = lay_out(calls)
    for one, (_, begin, length) in zip(buffers, drawn, strict=True):
        assert one.place % 64 == 0
        assert 0 <= one.place <= arena - one.nbytes
        for other, (_, other_begin, other_length) in zip(buffers, drawn, strict=True):
            if one is not other and begin <= other_begin + other_length and other_begin <= begin + length:
                assert one.place + one.nbytes <= other.place or other.place + other.nbytes <= one.place


def test_a_pointwise_call_writes_over_an_input_that_nothing_needs_later() -> None:
    first, second, third = (Value.whole(Buffer("arena", -1, 400), "float32", (100,)) for _ in range(3))
    last = Value.whole(Buffer("output", 0), "float32", (100,))
    lay_out(
        [
            ("copy", [last, first]),
            ("pointwise", [second, first]),
            ("pointwise", [third, second]),
            ("copy", [third, last]),
        ]
    )
    assert first.buffer.place == second.buffer.place == third.buffer.place
    kept, again = (Value.whole(Buffer("arena", -1, 400), "float32", (100,)) for _ in range(2))
    lay_out([("copy", [last, kept]), ("pointwise", [again, kept]), ("add", [kept, again])])
    assert kept.buffer.place != again.buffer.place
