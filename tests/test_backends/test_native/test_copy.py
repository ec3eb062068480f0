"""The `copy` kernel against torch."""

from __future__ import annotations

import pytest
import torch

from furiosa_build.backends.native.library import Library
from tests.test_backends.test_native.calls import DTYPES, Call, run

_DTYPES = [dtype for dtype in DTYPES if dtype is not torch.float8_e4m3fn]


@pytest.mark.parametrize("source", _DTYPES, ids=str)
def test_every_conversion_is_that_of_torch(each_width: Library, source: torch.dtype) -> None:
    drawn = torch.randn(3, 5, 700, generator=torch.Generator().manual_seed(0)) * 50
    x = (drawn.abs() if source is torch.uint8 else drawn).to(source)
    for target in _DTYPES:
        if target is torch.uint8 and x.dtype.is_floating_point:
            continue  # of a negative number torch says nothing
        out = torch.empty(x.shape, dtype=target)
        run(each_width, Call("copy", [x, out]))
        assert torch.equal(out, x.to(target)), target


def test_floats_are_rounded_as_torch_rounds(each_width: Library) -> None:
    bits = torch.arange(0, 2**32, 65521, dtype=torch.int64)
    x = (bits - 2**31).to(torch.int32).view(torch.float32)
    for target in (torch.bfloat16, torch.float16):
        out = torch.empty(x.shape, dtype=target)
        run(each_width, Call("copy", [x, out]))
        wanted = x.to(target)
        assert torch.equal(out.isnan(), wanted.isnan())
        assert torch.equal(out.nan_to_num(1.0), wanted.nan_to_num(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_any_strides(each_width: Library, dtype: torch.dtype) -> None:
    x = torch.randint(0, 100, (7, 6, 5, 40)).to(dtype)
    for view in (
        x.permute(3, 1, 0, 2),
        x[:, 1:4, ::2, 3:9],
        x[2:3, :, :1].expand(4, 6, 5, 40),
        x.select(3, 1),
        x[0, 0, 0, 0],
        x.transpose(-1, -2).unsqueeze(0),
    ):
        wide = torch.zeros(*view.shape, 3, dtype=dtype)
        for out in (torch.empty(view.shape, dtype=dtype), wide[..., 1]):
            run(each_width, Call("copy", [view, out]))
            assert torch.equal(out, view)
        assert not wide[..., 0].any()
        assert not wide[..., 2].any()


def test_the_parts_of_a_concatenation(library: Library) -> None:
    parts = [torch.randn(4, size, 6) for size in (1, 5, 300)]
    out = torch.empty(4, 306, 6)
    run(library, *(Call("copy", [part, view]) for part, view in zip(parts, out.split([1, 5, 300], 1), strict=True)))
    assert torch.equal(out, torch.cat(parts, 1))


def test_no_elements(library: Library) -> None:
    run(library, Call("copy", [torch.empty(3, 0), torch.empty(3, 0)]))
