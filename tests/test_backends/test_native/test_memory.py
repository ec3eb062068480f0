"""What is in use at the same time does not share memory, but for what a pointwise call writes over."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from furiosa_build.backends.native.memory import lay_out
from furiosa_build.backends.native.plan import ALIGNMENT
from furiosa_build.backends.native.values import Buffer, Value


def _numbers(count: int) -> Value:
    return Value.whole(Buffer("arena", 0, 4 * count), "float32", (count,))


@given(st.data())
def test_the_operands_of_a_call_and_what_is_needed_later_lie_apart(data: st.DataObject) -> None:
    """Calls that copy: each makes a value out of some that were made before."""
    made = [_numbers(data.draw(st.integers(1, 200)))]
    calls: list[tuple[str, list[Value]]] = []
    for _ in range(data.draw(st.integers(1, 12))):
        read = data.draw(st.lists(st.sampled_from(made), min_size=1, max_size=3, unique_by=id))
        made.append(_numbers(data.draw(st.integers(1, 200))))
        calls.append(("matmul", [*read, made[-1]]))
    size = lay_out(calls)
    for number in range(len(calls)):
        before = {value.buffer for _, operands in calls[: number + 1] for value in operands}
        after = {value.buffer for _, operands in calls[number:] for value in operands}
        places = sorted((buffer.place, buffer.place + buffer.nbytes) for buffer in before & after)
        assert all(place % ALIGNMENT == 0 for place, _ in places)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))
        assert places[-1][1] <= size


def test_a_pointwise_call_writes_over_what_nobody_needs_any_more() -> None:
    first, second, third = (_numbers(64) for _ in range(3))
    lay_out([("copy", [_numbers(64), first]), ("pointwise", [second, first]), ("pointwise", [third, second, first])])
    assert first.buffer.place != second.buffer.place == third.buffer.place
