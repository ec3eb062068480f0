"""write_kv_cache and paged_attention, against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from furiosa_build.backends.native.library import Library
from furiosa_build.backends.ops import paged_attention_reference, write_kv_cache_reference

from .calls import Call, lay_out_cache, read_cache, run

SLOTS = 704
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Largest error, in units of the largest value that is attended to: what rounding shares and outputs costs."""


@dataclass(frozen=True)
class Case:
    """Shapes of one call. `context` is 0 for prefill; decode has one token. `chunk`: the context is divided. `block`:
    so many slots lie side by side.
    """

    batch: int = 2
    kv_heads: int = 2
    group: int = 2
    tokens: int = 1
    context: int = 100
    size: int = 64
    value_size: int = 64
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scaling: float | None = None
    dtype: torch.dtype = torch.float32
    chunk: int | None = None
    block: int = 16


CASES = {
    "decode": Case(),
    "decode of one KV head for all": Case(kv_heads=1, group=16, context=333),
    "decode of as many KV heads": Case(kv_heads=5, group=1, context=65),
    "decode, long": Case(batch=1, context=640, group=7, size=128, value_size=128),
    "decode, sliding": Case(context=200, window=70),
    "decode, capped": Case(softcap=3.0, scaling=0.7),
    "decode, sinks": Case(sinks=True, group=3),
    "decode, all": Case(sinks=True, softcap=5.0, window=33, context=150, size=80, value_size=72),
    "prefill": Case(tokens=70, context=0),
    "prefill of one token": Case(tokens=1, context=0),
    "prefill, sliding": Case(tokens=150, context=0, window=20),
    "prefill, sinks": Case(tokens=33, context=0, sinks=True, window=9, kv_heads=1, group=9),
    "prefill, capped": Case(tokens=130, context=0, softcap=4.0, batch=1),
    "append": Case(tokens=20, context=130),
    "append, sliding": Case(tokens=40, context=180, window=50, group=5),
    "append, capped": Case(tokens=9, context=90, softcap=2.0, sinks=True),
    "divided": Case(context=300, chunk=128, group=4),
    "slots anywhere": Case(context=300, block=1),
    "slots anywhere, append": Case(tokens=20, context=130, block=5),
    "slots anywhere, prefill": Case(tokens=70, context=0, block=1),
    "divided, sliding": Case(context=300, chunk=64, window=70, batch=3),
    "divided, append, all": Case(
        tokens=5, context=220, chunk=64, window=90, softcap=3.0, sinks=True, size=80, value_size=33
    ),
    "odd sizes": Case(tokens=5, context=40, size=34, value_size=19),
    "values of another size": Case(tokens=17, context=80, size=96, value_size=64),
    "large heads": Case(batch=1, kv_heads=1, tokens=3, context=70, size=256, value_size=256),
}


@dataclass
class Operands:
    """The arguments of `paged_attention`."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_cache: Tensor
    value_cache: Tensor
    slot_mapping: Tensor
    context_slots: Tensor | None
    context_lens: Tensor | None
    position_ids: Tensor | None
    sinks: Tensor | None

    def of_sequence(self, number: int) -> Operands:
        """Those of one sequence."""

        def own(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[number : number + 1]

        changed = {name: own(getattr(self, name)) for name in self.__dataclass_fields__ if name not in _SHARED}
        return replace(self, **changed)


_SHARED = ("key_cache", "value_cache", "sinks")


def draw(case: Case, seed: int = 0) -> Operands:
    """Operands whose caches hold the context; the new tokens' keys and values are written there already."""
    torch.manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(case.dtype)

    heads, context = case.kv_heads * case.group, case.context or case.tokens
    lens = torch.randint(case.tokens, context + 1, (case.batch,))
    slots = draw_slots(case, context)
    positions = torch.stack([torch.arange(int(n) - case.tokens, int(n)) for n in lens])
    found = Operands(
        # As a model has them: the heads' dimension moved before that of the tokens.
        query=normal(case.batch, case.tokens, heads, case.size).transpose(1, 2),
        key=normal(case.batch, case.tokens, case.kv_heads, case.size).transpose(1, 2),
        value=normal(case.batch, case.tokens, case.kv_heads, case.value_size).transpose(1, 2),
        key_cache=normal(SLOTS, case.kv_heads, case.size),
        value_cache=normal(SLOTS, case.kv_heads, case.value_size),
        slot_mapping=slots.gather(1, positions),
        context_slots=slots if case.context else None,
        context_lens=lens if case.context and case.tokens == 1 else None,
        position_ids=positions if case.context and case.tokens > 1 else None,
        sinks=normal(heads) if case.sinks else None,
    )
    return found


def draw_slots(case: Case, context: int) -> Tensor:
    """Slots of blocks that lie anywhere; sequences share some of them, where they only read."""
    num_blocks, size = -(-context // case.block), case.block
    drawn = [torch.randperm(SLOTS // size - 1)[: case.batch * num_blocks] + 1 for _ in range(case.batch)]
    if not case.context:
        drawn = list(drawn[0].reshape(case.batch, -1))
    places = torch.arange(size)
    return torch.stack([(blocks[:num_blocks, None] * size + places).reshape(-1)[:context] for blocks in drawn])


def expected(case: Case, given: Operands) -> Tensor:
    """In float64, but for the softmax of capped scores and sinks."""

    def exact(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    cached = case.context > 0
    return paged_attention_reference(
        given.query.double(),
        None if cached else exact(given.key),
        None if cached else exact(given.value),
        given.key_cache.double(),
        given.value_cache.double(),
        None if cached else given.slot_mapping,
        given.context_slots,
        given.context_lens,
        given.position_ids,
        case.scaling,
        case.window,
        case.softcap,
        exact(given.sinks),
    )


def attend(
    library: Library, case: Case, given: Operands, threads: int = 2, caches: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """What the kernel makes of it. `caches` are laid out as the library has them; else they are those given."""
    batch, heads, tokens, size = given.query.shape
    out = torch.full((batch, tokens, heads, given.value.shape[-1]), torch.nan, dtype=case.dtype)
    cached = case.context > 0
    key_cache, value_cache = given.key_cache, given.value_cache
    if not cached:
        key_cache, value_cache = key_cache.clone(), value_cache.clone()
        write_kv_cache_reference(given.key, given.value, key_cache, value_cache, given.slot_mapping)
    operands = [
        given.query,
        *(caches or (lay_out_cache(key_cache, "keys"), lay_out_cache(value_cache, "values"))),
        given.context_slots if cached else given.slot_mapping,
        *(given.context_lens, given.position_ids),
    ]
    floats = [size**-0.5 if case.scaling is None else case.scaling, case.softcap or 0.0]
    window = case.window or 0
    if case.chunk is None:
        run(
            library,
            Call("paged_attention", [*operands, given.sinks, out, None], [window, 0], floats),
            threads=threads,
        )
    else:
        partial = torch.full((batch, -(-case.context // case.chunk), tokens, heads, out.shape[-1] + 2), torch.nan)
        run(
            library,
            Call("paged_attention", [*operands, None, None, partial], [window, case.chunk], floats),
            Call("join_attention", [partial, given.sinks, out]),
            threads=threads,
        )
    return out


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_it_attends_as_the_reference(each_cpu: Library, name: str, dtype: torch.dtype) -> None:
    case = replace(CASES[name], dtype=dtype)
    given = draw(case)
    found = attend(each_cpu, case, given).double()
    assert (found - expected(case, given)).abs().max() <= TOLERANCE[dtype] * 3


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["decode", "decode, long", "append, sliding", "prefill", "divided"])
def test_numbers_depend_on_nothing_beside_them(library: Library, name: str, dtype: torch.dtype) -> None:
    case = replace(CASES[name], dtype=dtype)
    given = draw(case)
    found = attend(library, case, given, threads=1)
    assert torch.equal(found, attend(library, case, given, threads=5))
    for number in range(case.batch):
        assert torch.equal(found[number : number + 1], attend(library, case, given.of_sequence(number)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["decode", "append, sliding", "prefill", "divided, append, all", "odd sizes"])
def test_numbers_do_not_depend_on_where_the_context_lies(each_width: Library, name: str, dtype: torch.dtype) -> None:
    case = replace(CASES[name], dtype=dtype, batch=1)
    given = draw(case)
    rows = given.slot_mapping if given.context_slots is None else given.context_slots
    found = attend(each_width, case, given)
    for block in (1, 3, 8, 16, 32):
        slots = draw_slots(replace(case, block=block), rows.shape[1])
        moved = replace(given, key_cache=given.key_cache.clone(), value_cache=given.value_cache.clone())
        for cache, before in ((moved.key_cache, given.key_cache), (moved.value_cache, given.value_cache)):
            cache[slots[0]] = before[rows[0]]
        if given.context_slots is None:
            moved.slot_mapping = slots
        else:
            moved.context_slots = slots
        assert torch.equal(found, attend(each_width, case, moved))


@pytest.mark.parametrize(
    "name", ["decode", "decode, sliding", "append, sliding", "prefill, sliding", "divided, sliding"]
)
def test_what_lies_outside_the_context_is_not_read(library: Library, name: str) -> None:
    case = replace(CASES[name], batch=1)
    given = draw(case)
    clean = attend(library, case, given)
    if given.context_slots is not None:
        length = int(given.context_lens if given.context_lens is not None else given.position_ids[0, -1] + 1)
        first = 0 if case.window is None else max(0, length - case.tokens + 1 - case.window)
        unused = torch.ones(SLOTS, dtype=torch.bool)
        unused[given.context_slots[0, first:length]] = False
        given.key_cache[unused] = given.value_cache[unused] = torch.nan
        given.context_slots[0, length:] = SLOTS * 1000  # not even looked up
    assert torch.equal(clean, attend(library, case, given))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("chunk", [None, 64])
def test_nothing_to_attend_to_gives_zeros_and_nan_goes_through(
    library: Library, chunk: int | None, sinks: bool
) -> None:
    case = Case(batch=3, context=100, chunk=chunk, sinks=sinks)
    given = draw(case)
    given.context_lens = torch.tensor([0, 10, 100])
    given.query[1] = torch.nan
    found = attend(library, case, given)
    assert (found[0] == 0).all()
    assert found[1].isnan().all()
    assert found[2].isfinite().all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_cache_is_written(each_width: Library, dtype: torch.dtype) -> None:
    given = draw(Case(batch=3, tokens=7, kv_heads=3, size=34, value_size=21, dtype=dtype))
    given.slot_mapping[2, 4:] = 0  # padding: the last of them stays
    key_cache, value_cache = given.key_cache.clone(), given.value_cache.clone()
    write_kv_cache_reference(given.key, given.value, key_cache, value_cache, given.slot_mapping)
    keys, values = lay_out_cache(given.key_cache, "keys"), lay_out_cache(given.value_cache, "values")
    run(each_width, Call("write_kv_cache", [given.key, given.value, keys, values, given.slot_mapping]))
    assert torch.equal(read_cache(keys, "keys"), key_cache)
    assert torch.equal(read_cache(values, "values"), value_cache)
