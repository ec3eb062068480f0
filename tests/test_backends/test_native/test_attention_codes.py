"""KV caches of 8-bit codes: written, and attended to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from furiosa_build.backends.native.library import Library

from .calls import CODES, Call, decode_rows, encode_rows, lay_out_codes, read_codes, run
from .test_attention import CASES, SLOTS, TOLERANCE, Case, Operands, attend, draw, expected

KINDS = sorted(CODES)


def encoded(given: Operands, kind: str) -> tuple[Operands, tuple[Tensor, Tensor]]:
    """The same with what codes stand for in its caches (float64), and the caches of these codes."""
    exact, caches = {}, []
    for name, part in (("key_cache", "keys"), ("value_cache", "values")):
        codes, scales = encode_rows(getattr(given, name).float(), kind)
        exact[name] = decode_rows(codes, scales, kind)
        caches.append(lay_out_codes(codes, scales, part, kind))
    keys, values = caches
    return replace(given, **exact), (keys, values)


def check(library: Library, case: Case, kind: str) -> Tensor:
    """Attends, and compares with the reference in float64 on what the codes stand for."""
    given, caches = encoded(draw(case), kind)
    found = attend(library, case, given, caches=caches)
    largest = float(given.value_cache.abs().max())
    assert (found.double() - expected(case, given)).abs().max() <= TOLERANCE[case.dtype] * max(3.0, largest)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.context and case.size % 4 == 0])
def test_it_attends_to_what_codes_stand_for(each_cpu: Library, name: str, dtype: torch.dtype, kind: str) -> None:
    check(each_cpu, replace(CASES[name], dtype=dtype), kind)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 9),
        tokens=st.just(1) | st.integers(2, 20),
        context=st.integers(20, 300),
        size=st.integers(1, 36).map(lambda n: 4 * n),
        value_size=st.integers(1, 140),
        window=st.none() | st.integers(1, 90),
        dtype=st.sampled_from(list(TOLERANCE)),
        chunk=st.sampled_from([None, 64, 256]),
        block=st.integers(1, 40),
    ),
    kind=st.sampled_from(KINDS),
)
def test_of_any_shape(each_width: Library, case: Case, kind: str) -> None:
    check(each_width, case, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_is_written_is_as_near_as_the_format_allows(each_width: Library, dtype: torch.dtype, kind: str) -> None:
    given = draw(Case(batch=3, tokens=37, context=0, kv_heads=3, size=36, value_size=21, dtype=dtype))
    given.key[0, 0, 0] = 0
    given.key[0, 0, 1] *= 1e-3
    given.value[0, 0, 2] = torch.nan
    _, (keys, values) = encoded(given, kind)
    run(each_width, Call("write_kv_cache", [given.key, given.value, keys, values, given.slot_mapping]))
    for cache, part, new in ((keys, "keys", given.key), (values, "values", given.value)):
        codes, scales = (x[given.slot_mapping] for x in read_codes(cache, part))
        rows = new.transpose(1, 2)
        assert torch.equal(scales.isnan(), rows.isnan().any(-1))
        error = (decode_rows(codes.contiguous(), scales, kind) - rows.double()).abs()
        step = scales.double()[..., None]
        allowed = step / 2 if kind == "int8" else rows.double().abs() / 16 + step / 1024
        assert (error <= allowed * (1 + 1e-5)).logical_or(error.isnan()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_other_slots_stay(library: Library, kind: str) -> None:
    given = draw(Case(batch=1, tokens=5, context=0))
    _, (keys, values) = encoded(given, kind)
    before = [read_codes(cache, part) for cache, part in ((keys, "keys"), (values, "values"))]
    run(library, Call("write_kv_cache", [given.key, given.value, keys, values, given.slot_mapping]))
    untouched = torch.ones(SLOTS, dtype=torch.bool)
    untouched[given.slot_mapping] = False
    for cache, part, (codes, scales) in zip((keys, values), ("keys", "values"), before, strict=True):
        found_codes, found_scales = read_codes(cache, part)
        assert torch.equal(found_codes[untouched], codes[untouched])
        assert torch.equal(found_scales[untouched], scales[untouched])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["decode", "append, sliding", "divided, sliding"])
def test_what_lies_outside_the_context_is_not_read(library: Library, name: str, kind: str) -> None:
    case = replace(CASES[name], batch=1, dtype=torch.bfloat16)
    drawn = draw(case)
    given, caches = encoded(drawn, kind)
    clean = attend(library, case, given, caches=caches)
    assert given.context_slots is not None
    length = int(given.context_lens if given.context_lens is not None else given.position_ids[0, -1] + 1)  # type: ignore[index]
    first = 0 if case.window is None else max(0, length - case.tokens + 1 - case.window)
    unused = torch.ones(SLOTS, dtype=torch.bool)
    unused[given.context_slots[0, first:length]] = False
    drawn.key_cache[unused] = drawn.value_cache[unused] = torch.nan
    given, caches = encoded(drawn, kind)
    assert torch.equal(clean, attend(library, case, given, caches=caches))
