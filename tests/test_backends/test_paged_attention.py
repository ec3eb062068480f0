"""Paged attention, as its reference and as backends lower it, is attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from furiosa_build.backends import ops
from furiosa_build.backends.grouped_attention import lower_paged_attention

Attend = Callable[..., Tensor]
FORMULATIONS = [
    pytest.param(ops.paged_attention, id="reference"),
    pytest.param(lower_paged_attention, id="inductor"),
]

POISON = 1e4
"""Fills slots that nobody owns: an attention that looks at one of them is far off."""

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
"""float32 against float64, over contexts of at most 40 tokens with values near 1."""


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What attention means, a query at a time, in float64.

    query [heads, tokens, size], key [kv_heads, tokens, size], value [kv_heads, tokens, value size]: one whole sequence
    -> [tokens, heads, value size].
    """
    heads, tokens, _ = query.shape
    group = heads // key.shape[0]
    output = torch.empty((tokens, heads, value.shape[2]), dtype=torch.float64)
    for head in range(heads):
        for token in range(tokens):
            begin = 0 if window is None else max(0, token + 1 - window)
            keys = key[head // group, begin : token + 1].double()
            scores = keys @ query[head, token].double() * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            sink = torch.zeros(0) if sinks is None else sinks[head].reshape(1)
            weights = torch.softmax(torch.cat([scores, sink.double()]), dim=0)[: len(scores)]
            output[token, head] = weights @ value[head // group, begin : token + 1].double()
    return output


@dataclass
class Case:
    """Sequences that are prefilled together and then decode together, and where their tokens lie."""

    kv_heads: int
    group: int
    size: int
    value_size: int
    prompts: list[int]
    new_tokens: int
    padding_rows: int
    window: int | None
    scaling: float | None
    softcap: float | None
    has_sinks: bool
    spare: int
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    return Case(
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.sampled_from([1, 2, 4])),
        size=(size := draw(st.sampled_from([4, 8, 24]))),
        value_size=draw(st.sampled_from([size, size, 4, 12])),
        prompts=draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)),
        new_tokens=draw(st.integers(0, 4)),
        padding_rows=draw(st.integers(0, 2)),
        window=draw(st.none() | st.integers(1, 18)),
        scaling=draw(st.none() | st.just(0.37)),
        softcap=draw(st.none() | st.none() | st.just(1.5)),
        has_sinks=draw(st.sampled_from([False, False, True])),
        spare=draw(st.integers(0, 5)),
        seed=draw(st.integers(0, 2**16)),
    )


class Sequences:
    """The sequences of a case, their slots scattered over the cache. Slot 0 is where padding is written."""

    def __init__(self, case: Case, attend: Attend) -> None:
        self.case, self._attend = case, attend
        generator = torch.Generator().manual_seed(case.seed)
        lengths = [prompt + case.new_tokens for prompt in case.prompts]
        self.query = [torch.randn((case.kv_heads * case.group, n, case.size), generator=generator) for n in lengths]
        self.key = [torch.randn((case.kv_heads, n, case.size), generator=generator) for n in lengths]
        self.value = [torch.randn((case.kv_heads, n, case.value_size), generator=generator) for n in lengths]
        self.variant: dict[str, Any] = {}
        if case.softcap is not None:
            self.variant["softcap"] = case.softcap
        if case.has_sinks:
            self.variant["sinks"] = torch.randn(case.kv_heads * case.group, generator=generator)
        num_slots = 1 + sum(lengths) + case.spare
        order = 1 + torch.randperm(num_slots - 1, generator=generator)
        self.slots = list(order[: sum(lengths)].split(lengths))
        self.unowned = [0, *order[sum(lengths) :].tolist()]
        self.key_cache = torch.full((num_slots, case.kv_heads, case.size), POISON)
        self.value_cache = torch.full((num_slots, case.kv_heads, case.value_size), POISON)

    def expected(self) -> list[Tensor]:
        scaling = self.case.size**-0.5 if self.case.scaling is None else self.case.scaling
        return [
            plain_attention(query, key, value, scaling, self.case.window, **self.variant)
            for query, key, value in zip(self.query, self.key, self.value, strict=True)
        ]

    def prefill(self, length: int) -> list[Tensor]:
        """All prompts at once, in a bucket of `length` tokens: what is left of a row is padding."""
        case = self.case
        batch = len(case.prompts) + case.padding_rows
        query, key, value = self._padding(batch, length)
        slot_mapping = torch.zeros((batch, length), dtype=torch.int64)
        for row, tokens in enumerate(case.prompts):
            query[row, :, :tokens] = self.query[row][:, :tokens]
            key[row, :, :tokens] = self.key[row][:, :tokens]
            value[row, :, :tokens] = self.value[row][:, :tokens]
            slot_mapping[row, :tokens] = self.slots[row][:tokens]
        output = self._run(query, key, value, slot_mapping, None, None)
        return [output[row, :tokens] for row, tokens in enumerate(case.prompts)]

    def decode(self, step: int, length: int) -> list[Tensor]:
        """The next token of every sequence, in a bucket of `length` tokens of context."""
        case = self.case
        batch = len(case.prompts) + case.padding_rows
        query, key, value = self._padding(batch, 1)
        slot_mapping = torch.zeros((batch, 1), dtype=torch.int64)
        context_slots = torch.zeros((batch, length), dtype=torch.int64)
        context_lens = torch.ones(batch, dtype=torch.int64)
        for row, prompt in enumerate(case.prompts):
            place = prompt + step
            query[row, :, 0], key[row, :, 0] = self.query[row][:, place], self.key[row][:, place]
            value[row, :, 0] = self.value[row][:, place]
            slot_mapping[row, 0] = self.slots[row][place]
            context_slots[row, : place + 1] = self.slots[row][: place + 1]
            context_lens[row] = place + 1
        output = self._run(query, key, value, slot_mapping, context_slots, context_lens)
        assert output.isfinite().all(), "a padding row is not finite"
        return [output[row] for row in range(len(case.prompts))]

    def append(self, starts: list[int], counts: list[int], query_length: int, length: int) -> list[Tensor]:
        """counts[i] tokens of sequence i from starts[i] on, in a bucket of `query_length` tokens over `length`."""
        case = self.case
        batch = len(starts) + case.padding_rows
        query, key, value = self._padding(batch, query_length)
        slot_mapping = torch.zeros((batch, query_length), dtype=torch.int64)
        position_ids = torch.zeros((batch, query_length), dtype=torch.int64)
        context_slots = torch.zeros((batch, length), dtype=torch.int64)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            end = start + count
            query[row, :, :count], key[row, :, :count] = self.query[row][:, start:end], self.key[row][:, start:end]
            value[row, :, :count] = self.value[row][:, start:end]
            slot_mapping[row, :count] = self.slots[row][start:end]
            position_ids[row, :count] = torch.arange(start, end)
            context_slots[row, :end] = self.slots[row][:end]
        output = self._run(query, key, value, slot_mapping, context_slots, None, position_ids)
        assert output.isfinite().all(), "padding is not finite"
        return [output[row, :count] for row, count in enumerate(counts)]

    def _run(self, *tensors: Any) -> Tensor:
        query, key, value, slot_mapping, context_slots, context_lens, position_ids = (*tensors, None)[:7]
        output = self._attend(
            query,
            key,
            value,
            self.key_cache,
            self.value_cache,
            slot_mapping,
            context_slots,
            context_lens,
            position_ids,
            self.case.scaling,
            self.case.window,
            **self.variant,
        )
        assert output.is_contiguous(), "a model may take a view of it"
        return output

    def _padding(self, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of nobody, to be filled in."""
        case = self.case
        sizes = ((case.kv_heads * case.group, case.size), (case.kv_heads, case.size), (case.kv_heads, case.value_size))
        query, key, value = (torch.full((batch, heads, tokens, size), 3.0) for heads, size in sizes)
        return query, key, value


@pytest.mark.parametrize("attend", FORMULATIONS)
@given(case=cases(), prefill_room=st.integers(0, 5), decode_room=st.integers(0, 9))
def test_attention_over_scattered_slots_is_attention(
    attend: Attend, case: Case, prefill_room: int, decode_room: int
) -> None:
    sequences = Sequences(case, attend)
    parts = [[part] for part in sequences.prefill(max(case.prompts) + prefill_room)]
    for step in range(case.new_tokens):
        for row, part in enumerate(sequences.decode(step, max(case.prompts) + case.new_tokens + decode_room)):
            parts[row].append(part)
    for found, expected in zip(parts, sequences.expected(), strict=True):
        torch.testing.assert_close(torch.cat(found).double(), expected, **TOLERANCE)


@pytest.mark.parametrize("attend", FORMULATIONS)
@given(case=cases(), data=st.data())
def test_attention_in_pieces_is_attention(attend: Attend, case: Case, data: st.DataObject) -> None:
    """Each sequence in pieces of its own sizes, side by side; the first begins with nothing computed."""
    sequences = Sequences(case, attend)
    lengths = [query.shape[1] for query in sequences.query]
    done = [0] * len(lengths)
    parts: list[list[Tensor]] = [[] for _ in lengths]
    query_length, room = data.draw(st.integers(2, 8)), data.draw(st.integers(0, 9))
    while done != lengths:
        left = [length - start for length, start in zip(lengths, done, strict=True)]
        counts = [data.draw(st.integers(min(1, n), min(n, query_length))) for n in left]
        for row, part in enumerate(sequences.append(done, counts, query_length, max(lengths) + room)):
            parts[row].append(part)
        done = [start + count for start, count in zip(done, counts, strict=True)]
    for found, expected in zip(parts, sequences.expected(), strict=True):
        torch.testing.assert_close(torch.cat(found).double(), expected, **TOLERANCE)


@pytest.mark.parametrize("attend", FORMULATIONS)
@given(case=cases())
def test_each_token_is_written_to_its_slot_and_nothing_else_is_written(attend: Attend, case: Case) -> None:
    sequences = Sequences(case, attend)
    sequences.prefill(max(case.prompts))
    for step in range(case.new_tokens):
        sequences.decode(step, max(case.prompts) + case.new_tokens)
    for slots, key, value in zip(sequences.slots, sequences.key, sequences.value, strict=True):
        assert sequences.key_cache[slots].equal(key.transpose(0, 1))
        assert sequences.value_cache[slots].equal(value.transpose(0, 1))
    untouched = sequences.unowned[1:]
    assert (sequences.key_cache[untouched] == POISON).all()
    assert (sequences.value_cache[untouched] == POISON).all()


@pytest.mark.parametrize("attend", FORMULATIONS)
def test_a_window_counts_the_token_itself(attend: Attend) -> None:
    """With a window of one a token sees itself alone, in prefill and in decode."""
    case = Case(1, 1, 4, 4, [5], 1, 0, window=1, scaling=None, softcap=None, has_sinks=False, spare=0, seed=0)
    sequences = Sequences(case, attend)
    torch.testing.assert_close(sequences.prefill(5)[0][:, 0], sequences.value[0][0, :5])
    torch.testing.assert_close(sequences.decode(0, 6)[0][:, 0], sequences.value[0][0, 5:6])


@pytest.mark.parametrize("attend", FORMULATIONS)
@given(case=cases())
def test_what_is_written_beforehand_is_attended_to_as_well(attend: Attend, case: Case) -> None:
    """Keys and values of all tokens are written, then the last token alone attends."""
    sequences = Sequences(case, attend)
    for row, expected in enumerate(sequences.expected()):
        key, value, slots = sequences.key[row][None], sequences.value[row][None], sequences.slots[row][None]
        write = ops.write_kv_cache if attend is ops.paged_attention else ops.write_kv_cache_reference
        caches = sequences.key_cache, sequences.value_cache
        write(key, value, *caches, slots)
        query, lens = sequences.query[row][None, :, -1:], torch.tensor([slots.shape[1]])
        places = (None, slots, lens, None, case.scaling, case.window)
        found = attend(query, None, None, *caches, *places, **sequences.variant)
        torch.testing.assert_close(found[0, 0].double(), expected[-1], **TOLERANCE)


def test_the_operators_do_what_they_declare() -> None:
    """torch's own checks: what is mutated, aliasing, and that the fake has the reference's shapes and strides."""
    query, key = torch.randn((2, 4, 3, 8)), torch.randn((2, 2, 3, 8))
    caches = (torch.zeros((16, 2, 8)), torch.zeros((16, 2, 8)))
    slots = torch.arange(6).reshape(2, 3)
    torch.library.opcheck(ops.write_kv_cache, (key, key, *caches, slots))
    for context in ((None, None, None), (slots, None, torch.arange(3).expand(2, 3).contiguous())):
        arguments = (query, key, key, *caches, slots, *context, None, None)
        torch.library.opcheck(ops.paged_attention, arguments)
    last = (query[:, :, :1].contiguous(), None, None, *caches, None, slots, torch.tensor([3, 2]), None, 0.5, 2)
    torch.library.opcheck(ops.paged_attention, last)
    small = torch.zeros((16, 2, 4))
    variant = (query, key, key[..., :4].contiguous(), caches[0], small, slots, None, None, None, None, None)
    torch.library.opcheck(ops.paged_attention, (*variant, 1.5, torch.randn(4)))
